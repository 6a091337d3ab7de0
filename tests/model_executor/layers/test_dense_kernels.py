"""Kernels give what plain PyTorch gives: all of them in Triton's interpreter, the code predictor's on a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.model_executor.interpreted import interpret, without_gpu
from vllm_omni.model_executor.models.qwen3_omni.code_predictor import CodePredictor

TINY = SimpleNamespace(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_code_groups=4,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_theta": 10000.0},
)
FULL = SimpleNamespace(
    vocab_size=2048,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=5,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    num_code_groups=16,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_theta": 1000000.0},
)


def draw(config: Any, dtype: torch.dtype, device: str = "cpu") -> CodePredictor:
    """A predictor whose codes depend on everything."""
    torch.manual_seed(0)
    model = CodePredictor(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1.0, 0.1)
        else:
            parameter.data.normal_(0.0, 1.0 if "embedding" in name else parameter.shape[-1] ** -0.5)
    return model.to(device, dtype)


def compare(dtype: torch.dtype) -> None:
    """Greedy and drawn rows together, on a CPU."""
    from vllm_omni.model_executor.layers import dense_kernels

    model = draw(TINY, dtype)
    assert dense_kernels.check(model.spec, TINY.vocab_size, torch.device("cpu"), dtype) is None
    hidden, first = torch.randn(2, 3, TINY.hidden_size, dtype=dtype)
    noise = model.noise(3, {}, hidden.device)
    for greedy in (torch.tensor([True, False, True]), torch.tensor([False, True, False])):
        want_codes, want_total = model(hidden, first, greedy, noise)
        codes, total = model._fused(hidden, first, greedy, noise)
        assert torch.equal(codes, want_codes)
        torch.testing.assert_close(total, want_total, atol=2e-2 if dtype == torch.float16 else 1e-5, rtol=0)
        assert len(set(codes.flatten().tolist())) > codes.numel() // 2


def compare_products(dtype: torch.dtype, kinds: tuple[str, ...], device: str) -> None:
    """Every way to cut a product, against float32 arithmetic: rows apart, a norm, a gate, a residual."""
    from vllm_omni.model_executor.layers.cuts import Plan
    from vllm_omni.model_executor.layers.product_kernels import product

    torch.manual_seed(0)
    cuts = [Plan("looped"), Plan("vector", 8, 8, 256), Plan("vector", 16, 4, 512), Plan("split", 8, 4, 128)]
    for cut in [*cuts, Plan("split", 16, 8, 64)]:
        for rows in (1, 2, 17, 40) if cut.kernel in kinds else ():
            if cut.kernel == "vector" and rows > 2:
                continue
            x = torch.randn(rows, 2, 1024, device=device).to(dtype)[:, 1]
            gains = (1 + 0.1 * torch.randn(1024, device=device)).to(dtype)
            weight = (torch.randn(32, 1024, device=device) / 32).to(dtype)
            residual = torch.randn(rows, 32, device=device).to(dtype)
            normed = F.rms_norm(x.float(), (1024,), gains.float(), 1e-6)
            gate, up = (normed @ weight.float().T).chunk(2, dim=-1)
            close = {"atol": 0.03, "rtol": 0.02}
            got = product(x, weight, norm=gains, eps=1e-6, gated=True, cut=cut)
            torch.testing.assert_close(got.float(), F.silu(gate) * up, **close)
            got = product(x, weight, residual=residual, cut=cut)
            torch.testing.assert_close(got.float(), x.float() @ weight.float().T + residual.float(), **close)


def compare_checks(device: str) -> None:
    """What a stage does at its start before it uses a product for a layer."""
    from vllm_omni.model_executor.layers.cuts import Plan
    from vllm_omni.model_executor.layers.product_kernels import check_product

    weight = torch.randn(32, 1024, device=device).bfloat16()
    cuts = {1: Plan("vector", 8, 8, 256), 2: Plan("vector", 8, 4, 512)}
    assert check_product(weight, cuts) is None
    weight[3, 5] = float("inf")
    assert check_product(weight, cuts) == "1 rows are off by nan of their result"


@without_gpu
def test_interpreted_kernels() -> None:
    """float16 has 16-bit logits, which are searched differently. Of bfloat16 the interpreter can only do the product
    that takes words apart."""
    interpret("""
    from tests.model_executor.layers import test_dense_kernels, expert_kernels, test_sampling, test_snake_kernel
    for dtype in (torch.float32, torch.float16): test_dense_kernels.compare(dtype)
    test_dense_kernels.compare_products(torch.float16, ('split', 'looped'), 'cpu')
    test_dense_kernels.compare_products(torch.bfloat16, ('vector',), 'cpu')
    test_dense_kernels.compare_checks('cpu')
    test_snake_kernel.compare('cpu')
    expert_kernels.compare_all()
    test_sampling.compare_kernels()""")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 16, 33, 64])
@torch.inference_mode()
def test_kernels_in_float32(batch: int) -> None:
    """The released sizes: the same codes, greedy and drawn."""
    model = draw(FULL, torch.float32, "cuda")
    hidden, first = torch.randn(2, batch, FULL.hidden_size, device="cuda")
    greedy = torch.arange(batch, device="cuda") % 2 == 0
    noise = model.noise(batch, {}, hidden.device)
    model.use_kernels()
    assert model.fused
    codes, total = model(hidden, first, greedy, noise)
    model.fused = False
    want_codes, want_total = model(hidden, first, greedy, noise)
    same = (codes == want_codes).all(dim=1)
    assert same.float().mean() >= 0.9  # a row goes its own way where two codes are all but equal
    torch.testing.assert_close(total[same], want_total[same], atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@torch.inference_mode()
def test_kernels_in_bfloat16() -> None:
    """First codes of many rows, before rounding can lead them apart; and all rows are alike in a batch and alone."""
    model = draw(FULL, torch.bfloat16, "cuda")
    hidden, first = torch.randn(2, 64, FULL.hidden_size, device="cuda", dtype=torch.bfloat16)
    greedy = torch.ones(64, dtype=torch.bool, device="cuda")
    noise = model.noise(64, {}, hidden.device)
    model.use_kernels()
    assert model.fused
    codes, _ = model(hidden, first, greedy, noise)
    alone = torch.cat([model(hidden[i : i + 1], first[i : i + 1], greedy[:1], noise[:1])[0] for i in range(8)])
    assert (codes[:8, 0] == alone[:, 0]).float().mean() >= 0.7
    model.fused = False
    want, _ = model(hidden, first, greedy, noise)
    assert (codes[:, 0] == want[:, 0]).float().mean() >= 0.7


@pytest.mark.gpu
@torch.inference_mode()
def test_products_of_every_cut() -> None:
    compare_products(torch.bfloat16, ("looped", "vector", "split"), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8, 32])
@torch.inference_mode()
def test_early_kernels_wait_for_what_they_read(batch: int) -> None:
    """Frames in a graph, for two inputs in turn, are the same as without overlap, every time."""
    from vllm_omni.model_executor.layers.graphed import record
    from vllm_omni.model_executor.layers.overlap import OFF, can_overlap, overlap, set_overlap

    model = draw(FULL, torch.bfloat16, "cuda")
    inputs = torch.randn(2, 2, batch, FULL.hidden_size, device="cuda", dtype=torch.bfloat16)
    given = inputs[0].clone()
    greedy = torch.arange(batch, device="cuda") % 2 == 0
    noise = model.noise(batch, {}, inputs.device)
    model.use_kernels()
    assert model.fused
    if not can_overlap(inputs.device):
        pytest.skip("this GPU has no programmatic dependent launch")
    when = overlap(inputs.device)
    assert when != OFF
    try:
        set_overlap(inputs.device, OFF)
        want = [model(*value, greedy, noise) for value in inputs]
        set_overlap(inputs.device, when)
        graph, found = record(lambda: model(*given, greedy, noise), None)
        for turn in range(20):
            given.copy_(inputs[turn % 2])
            graph.replay()
            assert all(map(torch.equal, found, want[turn % 2]))
    finally:
        set_overlap(inputs.device, when)
