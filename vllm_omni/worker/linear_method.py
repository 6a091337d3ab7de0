"""vLLM's dense layers, with this package's kernel for steps of a few rows.

A step of a row or two is bound by reading the weights, and cuBLAS reads those of some sizes at a fraction of the
memory's speed. ``FewRowsLinearMethod`` takes the place of vLLM's method in the layers whose sizes are in ``GAINS``;
everything else runs as it does in vLLM: more rows, other sizes and GPUs, biases, quantised layers, a chosen
``linear_backend``, batch-invariant mode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_omni.model_executor.layers.cuts import Plan

logger = init_logger(__name__)

# By (rows at most, columns of the result, length of a row): where the kernel takes less time than cuBLAS on one H200,
# and how it is cut there (benchmarks/few_row_products.py).
GAINS: dict[tuple[int, int, int], Plan] = {
    (1, 1024, 2048): Plan("vector", 8, 8, 256),
    (1, 2048, 4096): Plan("vector", 16, 8, 256),
    (1, 2560, 1024): Plan("vector", 8, 8, 256),
    (1, 3584, 3584): Plan("vector", 4, 1, 256),
    (1, 5120, 2048): Plan("vector", 4, 1, 256),
    (1, 37888, 3584): Plan("vector", 2, 4, 512),
    (2, 1024, 2048): Plan("vector", 8, 4, 512),
    (2, 2048, 4096): Plan("vector", 2, 4, 512),
    (2, 2560, 1024): Plan("vector", 16, 8, 256),
    (2, 3584, 3584): Plan("vector", 4, 4, 256),
    (2, 5120, 2048): Plan("vector", 8, 4, 512),
    (2, 37888, 3584): Plan("vector", 4, 4, 256),
    (4, 1024, 2048): Plan("split", 16, 4, 128),
    (4, 2048, 4096): Plan("split", 16, 4, 128),
    (4, 2560, 1024): Plan("split", 8, 4, 128),
    (8, 1024, 2048): Plan("split", 16, 4, 128),
    (8, 2048, 4096): Plan("split", 16, 4, 128),
    (8, 2560, 1024): Plan("split", 8, 4, 128),
}
_LIMITS = (1, 2, 4, 8)
_MEASURED_ON = (9, 0)


def gain(rows: int, columns: int, length: int) -> Plan | None:
    """How a product of these sizes is cut where it gains, else None."""
    limit = next((limit for limit in _LIMITS if rows <= limit), None)
    return None if limit is None else GAINS.get((limit, columns, length))


def few_rows_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows [R, K] times ``weight`` [N, K]: [R, N]."""
    cut = gain(x.shape[0], *weight.shape)
    if cut is None or x.stride(-1) != 1 or x.data_ptr() % 16 or x.stride(0) % 8:
        return F.linear(x, weight)
    from vllm_omni.model_executor.layers.product_kernels import product  # Triton: only where there is a GPU

    return product(x, weight, cut=cut)


def _shape(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# One operation to the compiler, which must not see the choice by rows: it would compile each number of them.
_LIBRARY = torch.library.Library("vllm_omni", "FRAGMENT")
direct_register_custom_op(
    "few_rows_product", few_rows_product, fake_impl=_shape, target_lib=_LIBRARY, dispatch_key="CUDA"
)


class FewRowsLinearMethod(UnquantizedLinearMethod):
    """vLLM's product of a dense layer, but for steps of a few rows."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [..., K] times the layer's weight."""
        if bias is not None or x.dim() != 2:
            return super().apply(layer, x, bias)
        found: torch.Tensor = torch.ops.vllm_omni.few_rows_product(x, layer.weight)
        return found


def use_product_kernels(model: nn.Module, device: torch.device, config: VllmConfig) -> None:
    """Let the dense layers of a loaded model run steps of a few rows on the kernel, where it gains and is right."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != _MEASURED_ON:
        return
    if config.kernel_config.linear_backend != "auto" or envs.VLLM_BATCH_INVARIANT:
        return
    from vllm_omni.model_executor.layers.product_kernels import check_product  # Triton: only where there is a GPU

    wrong: dict[tuple[int, ...], str | None] = {}
    for layer in model.modules():
        if not isinstance(layer, LinearBase) or type(layer.quant_method) is not UnquantizedLinearMethod:
            continue
        weight = layer.weight
        cuts = {rows: cut for rows in _LIMITS if (cut := gain(rows, *weight.shape)) is not None}
        if not cuts or weight.dtype != torch.bfloat16 or not weight.is_contiguous():
            continue
        sizes = tuple(weight.shape)
        if sizes not in wrong:
            wrong[sizes] = check_product(weight, cuts)
            if wrong[sizes] is not None:
                logger.warning("products with a weight of %s run on cuBLAS: %s", sizes, wrong[sizes])
        if wrong[sizes] is None:
            layer.quant_method = FewRowsLinearMethod()
