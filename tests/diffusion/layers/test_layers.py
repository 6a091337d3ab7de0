"""Layers against the same mathematics written out, and the slices that ranks load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.layers.embeddings import sinusoid
from vllm_omni.diffusion.layers.linear import PackedRowParallelLinear, StackedLinear
from vllm_omni.diffusion.layers.norm import QKNorm, gated_residual, modulated_norm
from vllm_omni.diffusion.layers.rope import apply_rope, axial_rope
from vllm_omni.diffusion.models.common.latents import draw_noise, pack_2x2, unpack_2x2
from vllm_omni.diffusion.models.common.weights import load_param


@pytest.fixture(autouse=True)
def _parallel() -> Iterator[None]:
    parallel_state.init_parallel(DiffusionParallelConfig())
    yield
    parallel_state.destroy_parallel()


def as_rank(layer: Any, rank: int, size: int) -> Any:
    """The layer as rank ``rank`` of ``size`` would have it."""
    layer.tp_rank, layer.tp_size = rank, size
    return layer


def test_rope_turns_pairs() -> None:
    """As multiplication of complex numbers, and relative: scores depend on distance alone."""
    torch.manual_seed(0)
    x = torch.randn(1, 6, 2, 16)
    positions = [torch.arange(6), torch.arange(6) * 2]
    rope = axial_rope(positions, (8, 8))
    angles = torch.cat([torch.outer(p.float(), 10000 ** (-torch.arange(0, 8, 2) / 8)) for p in positions], -1)
    turned = torch.view_as_complex(x.unflatten(-1, (8, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
    assert torch.allclose(apply_rope(x, rope), torch.view_as_real(turned).flatten(-2), atol=1e-5)
    both = torch.stack((x, 2 * x), dim=2)
    assert torch.allclose(apply_rope(both, rope)[:, :, 1], 2 * apply_rope(x, rope), atol=1e-5)
    same = apply_rope(x[:, :1].expand(1, 6, 2, 16), rope)[0, :, 0]
    scores = same @ same.T
    assert torch.allclose(scores.diagonal(1), scores[0, 1].expand(5), atol=1e-4)


def test_norms() -> None:
    torch.manual_seed(0)
    x, shift, scale, gate = torch.randn(2, 3, 8), *(torch.randn(2, 1, 8) for _ in range(3))
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(modulated_norm(x, 1 + scale, shift), normed * (1 + scale) + shift, atol=1e-5)
    assert torch.allclose(gated_residual(x, gate, normed), x + gate * normed, atol=1e-6)
    half = gated_residual(*(torch.full((1, 1, 1), v, dtype=torch.float16) for v in (60000.0, 1.0, 60000.0)))
    assert half.item() == 65504
    norm = QKNorm(8)
    load_param(norm.weight, torch.full((8,), 2.0), "q")
    load_param(norm.weight, torch.full((8,), 3.0), "k")
    qk = torch.randn(1, 4, 2, 3, 8)
    rms = qk / (qk.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(norm(qk), rms * torch.tensor([2.0, 3.0])[:, None, None], atol=1e-5)


def test_sinusoid_is_that_of_diffusers() -> None:
    from diffusers.models.embeddings import Timesteps

    t = torch.tensor([0.0, 3.7, 611.0, 1000.0])
    for scale in (1, 1000):
        reference = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=scale)(t / scale)
        assert torch.equal(sinusoid(t / scale, scale=scale), reference)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_packed_rows_are_shared_part_by_part(size: int) -> None:
    """The sum over ranks of their slices of [attention, MLP] is the whole product."""
    torch.manual_seed(0)
    weight, attended, hidden = torch.randn(6, 24), torch.randn(3, 8), torch.randn(3, 16)
    total = torch.zeros(3, 6)
    for rank in range(size):
        layer = as_rank(PackedRowParallelLinear((8, 16), 6), rank, size)
        layer.weight.data = torch.empty(6, 24 // size)
        load_param(layer.weight, weight)
        mine = torch.cat((attended.chunk(size, 1)[rank], hidden.chunk(size, 1)[rank]), 1)
        total += mine @ layer.weight.T
    assert torch.allclose(total, torch.cat((attended, hidden), 1) @ weight.T, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_stacked_rows_are_shared_across_parts(size: int) -> None:
    """A rank's rows may begin in the middle of a part; end to end they are the whole matrix."""
    torch.manual_seed(0)
    parts = {"a": torch.randn(5, 4), "b": torch.randn(7, 4)}
    rows = []
    for rank in range(size):
        layer = as_rank(StackedLinear(4, {"a": 5, "b": 7}), rank, size)
        layer.weight.data = torch.empty(12 // size, 4)
        for name, tensor in parts.items():
            load_param(layer.weight, tensor, name)
        rows.append(layer.weight.data)
        assert layer.rows("b") == slice(5, 12)
    assert torch.equal(torch.cat(rows), torch.cat(list(parts.values())))


def test_latents() -> None:
    """Packing is undone by unpacking and has diffusers' order; several generators draw a row each."""
    from diffusers import FluxPipeline

    x = torch.randn(2, 3, 4, 6)
    tokens = pack_2x2(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 3, 4, 6))
    assert torch.equal(unpack_2x2(tokens, (2, 3)), x)
    cpu = torch.device("cpu")
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    rows = draw_noise((2, 3), generators, torch.float32, cpu)
    assert torch.equal(rows[1:], draw_noise((1, 3), [torch.Generator().manual_seed(2)], torch.float32, cpu))
