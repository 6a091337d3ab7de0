"""The attention layer and the choice of its backend."""

from __future__ import annotations

import pytest
import torch

from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.backends.registry import backend_class
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.attention.selector import get_attn_backend
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.forward_context import (
    get_forward_context,
    is_forward_context_available,
    set_forward_context,
)
from vllm_omni.errors import ConfigError


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention written out, [B, S, H, D]; ``allowed`` broadcasts to [B, H, queries, keys]."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def tensors(keys: int = 7, kv_heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 5, 4, 8), torch.randn(2, keys, kv_heads, 8), torch.randn(2, keys, kv_heads, 8)


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_without_mask(scale: float | None, kv_heads: int | None) -> None:
    q, k, v = tensors(kv_heads=kv_heads or 4)
    layer = Attention(num_heads=4, head_size=8, softmax_scale=scale, causal=False, num_kv_heads=kv_heads)
    assert torch.allclose(layer(q, k, v), plain(q, k, v, scale or 8**-0.5), atol=1e-5)


def test_causal() -> None:
    q, k, v = tensors(keys=5)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    out = Attention(4, 8, causal=True)(q, k, v)
    assert torch.allclose(out, plain(q, k, v, 8**-0.5, allowed), atol=1e-5)


def test_masks() -> None:
    """A mask of keys, a full one, and lengths, which say the same as a mask of the first keys."""
    q, k, v = tensors()
    layer = Attention(4, 8)
    keys = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    expected = plain(q, k, v, 8**-0.5, keys[:, None, None])
    assert torch.allclose(layer(q, k, v, AttentionMetadata(attn_mask=keys)), expected, atol=1e-5)
    full = torch.rand(2, 1, 5, 7) > 0.4
    full[..., 0] = True
    expected = plain(q, k, v, 8**-0.5, full)
    assert torch.allclose(layer(q, k, v, AttentionMetadata(attn_mask=full)), expected, atol=1e-5)
    lengths = AttentionMetadata.first_keys(torch.tensor([3, 7]), 7)
    short = plain(q[:1], k[:1, :3], v[:1, :3], 8**-0.5)
    assert torch.allclose(layer(q, k, v, lengths)[:1], short, atol=1e-5)
    assert lengths.key_lengths_B is not None
    assert lengths.key_lengths_B.tolist() == [3, 7]


def config(**kwargs: object) -> OmniDiffusionConfig:
    return OmniDiffusionConfig.from_kwargs(model="x", **kwargs)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration, then the environment, then the platform."""
    monkeypatch.delenv("DIFFUSION_ATTENTION_BACKEND", raising=False)
    assert get_attn_backend(config(device="cpu"), 64, torch.float32).name == "SDPA"
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "flash_attn")
    with pytest.raises(ConfigError, match="FLASH_ATTN: needs an NVIDIA GPU"):
        get_attn_backend(config(device="cpu"), 64, torch.float32)
    assert get_attn_backend(config(device="cpu", attention_backend="SDPA"), 64, torch.float32).name == "SDPA"
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "SDPPA")
    with pytest.raises(ConfigError, match="did you mean 'SDPA'"):
        get_attn_backend(config(device="cpu"), 64, torch.float32)


@pytest.mark.parametrize(
    ("device", "dtype", "size", "why"),
    [
        ("cpu", torch.bfloat16, 64, "NVIDIA"),
        ("cuda", torch.float32, 64, "bfloat16 or float16"),
        ("cuda", torch.bfloat16, 60, "multiple of 8"),
        ("cuda", torch.bfloat16, 512, "at most 256"),
    ],
)
def test_why_flash_attention_cannot_run(device: str, dtype: torch.dtype, size: int, why: str) -> None:
    reason = backend_class("FLASH_ATTN").why_not(device, dtype, size)
    assert reason is not None
    assert why in reason


def test_layer_takes_the_stages_backend() -> None:
    with (
        set_forward_context(config(device="cpu", attention_backend="FLASH_ATTN"), phase="load"),
        pytest.raises(ConfigError, match="attention_backend=FLASH_ATTN"),
    ):
        Attention(4, 8)


def test_forward_context() -> None:
    assert not is_forward_context_available()
    with pytest.raises(ConfigError):
        get_forward_context()
    outer = config(device="cpu")
    with set_forward_context(outer, phase="denoise", step_indices=(1, 4)):
        assert get_forward_context().od_config is outer
        assert get_forward_context().step_indices == (1, 4)
        with set_forward_context(outer, phase="decode"):
            assert get_forward_context().phase == "decode"
        assert get_forward_context().phase == "denoise"
    assert not is_forward_context_available()


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_flash_attention_on_a_gpu(masked: bool) -> None:
    torch.manual_seed(0)
    shape = (2, 640, 24, 128)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    metadata = AttentionMetadata.first_keys(torch.tensor([500, 640], device="cuda"), 640) if masked else None
    flash = backend_class("FLASH_ATTN")(24, 128, 128**-0.5, False, 24).forward(q, k, v, metadata)
    sdpa = backend_class("SDPA")(24, 128, 128**-0.5, False, 24).forward(q.float(), k.float(), v.float(), metadata)
    assert torch.nn.functional.cosine_similarity(flash.float().flatten(), sdpa.flatten(), dim=0) > 0.9999
