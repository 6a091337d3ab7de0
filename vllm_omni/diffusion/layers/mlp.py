"""Feed-forward parts of DiT blocks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm_omni.diffusion.layers.linear import column_linear, row_linear


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), linear; the middle is shared by the tensor-parallel ranks.

    Args:
        dim: width of the model.
        hidden_dim: width of the middle.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = column_linear(dim, hidden_dim)
        self.down = row_linear(hidden_dim, dim)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """[B, S, dim] to the same."""
        out: torch.Tensor = self.down(functional.gelu(self.up(x_BSD), approximate="tanh"))
        return out
