"""Which products of vLLM's dense layers run on this package's kernel; on a GPU see tests/gpu/test_linear_method.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

from benchmarks.moe_layers import one_rank
from vllm_omni.worker.linear_method import GAINS, few_rows_product, gain, use_product_kernels


def test_every_cut_fits_its_sizes() -> None:
    for (rows, columns, length), cut in GAINS.items():
        assert columns % cut.columns == 0
        assert length % (cut.chunk * (cut.warps if cut.kernel == "split" else 1)) == 0
        assert (cut.kernel == "vector") == (rows <= 2)
        assert gain(rows, columns, length) is cut


def test_rows_take_the_next_measured_number() -> None:
    assert gain(3, 1024, 2048) is GAINS[4, 1024, 2048]
    assert gain(9, 1024, 2048) is None
    assert gain(1, 1024, 2064) is None


def test_without_a_gpu_all_stays_vllms() -> None:
    config = VllmConfig()
    with one_rank(config):
        dense = ReplicatedLinear(2048, 1024, bias=False, params_dtype=torch.bfloat16, return_bias=False)
        use_product_kernels(nn.ModuleList([dense]), torch.device("cpu"), config)
        assert type(dense.quant_method) is UnquantizedLinearMethod


def test_more_rows_are_the_plain_product() -> None:
    x, weight = torch.randn(9, 2048).bfloat16(), torch.randn(1024, 2048).bfloat16()
    assert torch.equal(few_rows_product(x, weight), F.linear(x, weight))


def test_few_rows_are_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cut of the next measured number; the kernel itself runs elsewhere."""
    kernels = pytest.importorskip("vllm_omni.model_executor.layers.product_kernels")
    cuts = []
    monkeypatch.setattr(kernels, "product", lambda x, weight, cut: cuts.append(cut) or F.linear(x, weight))
    weight = torch.randn(1024, 2048).bfloat16()
    for rows in (1, 2, 5):
        few_rows_product(torch.randn(rows, 2048).bfloat16(), weight)
    few_rows_product(torch.randn(1, 4096).bfloat16()[:, ::2], weight)  # elements apart
    assert cuts == [GAINS[rows, 1024, 2048] for rows in (1, 2, 8)]
