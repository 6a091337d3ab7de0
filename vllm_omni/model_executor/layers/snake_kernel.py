"""SnakeBeta as one Triton kernel, alone or between two anti-aliasing filters (``bigvgan.AntiAliasedSnake``).

Plain PyTorch launches eight kernels for the one; for the other thirteen, and it writes the signal at twice its rate
three times and pads it twice, where here every output reads the dozen inputs that it depends on. Imported only where
there is a GPU.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

_BLOCK = 512


@triton.jit(do_not_specialize=["length"])
def _snake(x_ptr, taps_ptr, alpha_ptr, beta_ptr, out_ptr, length, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """``BLOCK`` outputs of one channel of one row; borders repeat the first and the last value, of x and at twice the
    rate."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel = row % CHANNELS
    rate = tl.exp(tl.load(alpha_ptr + channel))
    gain = 1.0 / (tl.exp(tl.load(beta_ptr + channel)) + 1e-9)
    x_at = x_ptr + row * length
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(12):
        place = tl.minimum(tl.maximum(2 * t + (k - 5), 0), 2 * length - 1)
        half, odd = place >> 1, place & 1
        value = tl.zeros((BLOCK,), dtype=tl.float32)
        for i in tl.static_range(6):
            source = tl.minimum(tl.maximum(half + odd + (i - 3), 0), length - 1)
            value += tl.load(x_at + source) * tl.load(taps_ptr + (11 - 2 * i) - odd)
        value = 2.0 * value
        wave = tl.sin(value * rate)
        acc += (value + wave * wave * gain) * tl.load(taps_ptr + k)
    tl.store(out_ptr + row * length + t, acc, mask=t < length)


def anti_aliased_snake(
    x_BCT: torch.Tensor, taps: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Upsample by two, SnakeBeta, downsample by two: [B, C, T] float32 keeps its shape; ``taps`` has 12 values."""
    batch, channels, length = x_BCT.shape
    x_BCT = x_BCT.contiguous()
    out = torch.empty_like(x_BCT)
    grid = (batch * channels, triton.cdiv(length, _BLOCK))
    _snake[grid](x_BCT, taps, alpha, beta, out, length, CHANNELS=channels, BLOCK=_BLOCK, num_warps=4)
    return out


@triton.jit(do_not_specialize=["length"])
def _plain_snake(x_ptr, alpha_ptr, beta_ptr, out_ptr, length, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """``BLOCK`` values of one channel of one row."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rate = tl.exp(tl.load(alpha_ptr + row % CHANNELS).to(tl.float32))
    gain = 1.0 / (tl.exp(tl.load(beta_ptr + row % CHANNELS).to(tl.float32)) + 1e-9)
    x = tl.load(x_ptr + row * length + t, mask=t < length, other=0.0).to(tl.float32)
    wave = tl.sin(x * rate)
    tl.store(out_ptr + row * length + t, (x + wave * wave * gain).to(out_ptr.dtype.element_ty), mask=t < length)


def snake_beta(x_BCT: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """x + sin(exp(alpha) x)^2 / exp(beta) per channel of [B, C, T], computed in float32."""
    batch, channels, length = x_BCT.shape
    x_BCT = x_BCT.contiguous()
    out = torch.empty_like(x_BCT)
    grid = (batch * channels, triton.cdiv(length, _BLOCK))
    _plain_snake[grid](x_BCT, alpha, beta, out, length, CHANNELS=channels, BLOCK=_BLOCK, num_warps=4)
    return out


def check(call: Callable[[], torch.Tensor], want: torch.Tensor) -> str | None:
    """Run a kernel once; what is wrong with it on this machine, or None."""
    try:
        got = call()
        off = float((got - want).float().abs().max())
    except (TritonError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if off <= 2e-2 * max(1.0, float(want.abs().max())) else f"results are off by {off:g}"
