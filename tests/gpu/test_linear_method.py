"""Dense layers of vLLM with this package's kernel for steps of a few rows, in released sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

from benchmarks.moe_layers import one_rank
from vllm_omni.model_executor.layers.graphed import record
from vllm_omni.worker.linear_method import GAINS, FewRowsLinearMethod, gain, use_product_kernels

pytestmark = pytest.mark.gpu
SIZES = sorted({(columns, length) for _, columns, length in GAINS})


def layer(length: int, columns: int, bias: bool = False) -> ReplicatedLinear:
    with torch.device("cuda"):
        made = ReplicatedLinear(length, columns, bias=bias, params_dtype=torch.bfloat16, return_bias=False)
        made.weight.data.normal_(0.0, length**-0.5)
    return made


@pytest.mark.parametrize(("columns", "length"), SIZES)
@torch.inference_mode()
def test_few_rows_run_on_the_kernel(columns: int, length: int) -> None:
    """As close to float32 as cuBLAS, alone and in a graph; more rows are cuBLAS's own."""
    torch.manual_seed(0)
    config = VllmConfig()
    with one_rank(config):
        dense = layer(length, columns)
        use_product_kernels(nn.ModuleList([dense]), torch.device("cuda", 0), config)
        assert isinstance(dense.quant_method, FewRowsLinearMethod)
        for rows in (1, 2, 3, 4, 8, 9, 64):
            x = torch.randn(rows, length, device="cuda", dtype=torch.bfloat16)
            want = x.float() @ dense.weight.float().T
            plain = F.linear(x, dense.weight)
            got = dense(x)
            off = float((got.float() - want).norm() / want.norm())
            assert off <= max(0.004, 1.5 * float((plain.float() - want).norm() / want.norm()))
            if gain(rows, columns, length) is None:
                assert torch.equal(got, plain)
            graph, again = record(lambda: dense(x), None)  # noqa: B023
            graph.replay()
            assert torch.equal(again, got)


@torch.inference_mode()
def test_compiled_for_any_number_of_rows() -> None:
    """One compilation for all numbers of rows, since the choice is inside of an operation."""
    _, columns, length = next(iter(GAINS))
    config = VllmConfig()
    with one_rank(config):
        dense = layer(length, columns)
        use_product_kernels(nn.ModuleList([dense]), torch.device("cuda", 0), config)
        compiled = torch.compile(lambda x: F.silu(dense(x)), dynamic=True, fullgraph=True)
        for rows in (3, 2, 5):
            x = torch.randn(rows, length, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x), F.silu(dense(x)), atol=0.02, rtol=0.02)


def test_what_stays_vllms() -> None:
    _, columns, length = next(iter(GAINS))
    config = VllmConfig()
    chosen = VllmConfig()
    chosen.kernel_config.linear_backend = "cutlass"
    with one_rank(config):
        other = layer(length, columns + 16)
        use_product_kernels(nn.ModuleList([other]), torch.device("cuda", 0), config)
        dense = layer(length, columns)
        use_product_kernels(nn.ModuleList([dense]), torch.device("cuda", 0), chosen)
        assert type(other.quant_method) is type(dense.quant_method) is UnquantizedLinearMethod
        biased = layer(length, columns, bias=True)
        use_product_kernels(nn.ModuleList([biased]), torch.device("cuda", 0), config)
        biased.bias.data.normal_()
        x = torch.randn(1, length, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(biased(x), F.linear(x, biased.weight, biased.bias))
