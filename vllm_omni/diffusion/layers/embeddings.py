"""Embeddings of timesteps and other scalars."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


def sinusoid(values_N: torch.Tensor, dim: int = 256, scale: float = 1.0) -> torch.Tensor:
    """Cosines, then sines, of ``scale * value`` at ``dim / 2`` frequencies from 1 down to 1/10000, float32 [N, dim].

    The order and the frequencies are those of diffusers' ``Timesteps(flip_sin_to_cos=True, downscale_freq_shift=0)``.
    """
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=values_N.device) / half
    angles = scale * (values_N[:, None].float() * torch.exp(exponent)[None, :])
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linears with SiLU between: from a sinusoid, or from pooled text, to the width of the model.

    Args:
        in_dim: width of the input.
        dim: width of the result.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_dim] to [N, dim]."""
        out: torch.Tensor = self.linear_2(functional.silu(self.linear_1(x)))
        return out
