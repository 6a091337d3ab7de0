"""Rotary position embedding over several axes (Su et al. 2021), as tables made once for a shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class RotaryEmbedding(NamedTuple):
    """Cosines and sines for a sequence, float32 [S, 1, D / 2]; they turn the pairs (0, 1), (2, 3), ... of a head."""

    cos: torch.Tensor
    sin: torch.Tensor

    def to(self, device: torch.device) -> RotaryEmbedding:
        """The tables on ``device``."""
        return RotaryEmbedding(self.cos.to(device), self.sin.to(device))

    def part(self, start: int, stop: int) -> RotaryEmbedding:
        """The tables of tokens ``start`` to ``stop``, as views."""
        return RotaryEmbedding(self.cos[start:stop], self.sin[start:stop])


def axial_rope(
    positions: Sequence[torch.Tensor],
    axes_dim: Sequence[int],
    theta: float = 10000.0,
    dtype: torch.dtype = torch.float32,
) -> RotaryEmbedding:
    """Tables for tokens at ``positions``, on the CPU.

    Args:
        positions: for each axis the position of each token, [S].
        axes_dim: width of the head that each axis turns; all even.
        theta: base of the frequencies.
        dtype: of the angles; FLUX.1 takes float64.
    """
    angles = []
    for position, dim in zip(positions, axes_dim, strict=True):
        exponent = torch.arange(0, dim, 2, dtype=dtype, device="cpu") / dim
        frequencies = 1.0 / torch.pow(torch.tensor(theta, dtype=dtype, device="cpu"), exponent)
        angles.append(torch.outer(position.to(dtype), frequencies))
    angle_SD = torch.cat(angles, dim=-1)[:, None, :]
    return RotaryEmbedding(angle_SD.cos().float(), angle_SD.sin().float())


def apply_rope(x: torch.Tensor, rope: RotaryEmbedding) -> torch.Tensor:
    """Turn ``x``, [B, S, ..., H, D], by the tables of its tokens; computed in float32."""
    cos, sin = rope
    if x.dim() == 5:  # queries and keys side by side
        cos, sin = cos[:, None], sin[:, None]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)
