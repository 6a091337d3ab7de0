"""Adaptive layer norm for models written outside of this package."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm_omni.diffusion.layers.norm import modulated_norm


class AdaLayerNorm(nn.Module):
    """LayerNorm without weights, scaled and shifted by an embedding (AdaLN, Peebles and Xie 2023).

    Reference: ``AdaLayerNormContinuous`` of diffusers without affine weights; parameters have its names. Families of
    this package compute the modulation of all blocks and steps at once instead (``DiTModel.modulate``).

    Args:
        hidden_size: width of the normalised states.
        ada_dim: width of the embedding.
        bias: whether the projection has a bias.
    """

    def __init__(self, hidden_size: int, ada_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(ada_dim, 2 * hidden_size, bias=bias)

    def forward(self, x_BSD: torch.Tensor, embedding_BE: torch.Tensor) -> torch.Tensor:
        """Normalise ``x_BSD`` by ``embedding_BE``, [B, S, D]."""
        scale, shift = self.linear(functional.silu(embedding_BE)).unsqueeze(1).chunk(2, dim=-1)
        return modulated_norm(x_BSD, 1 + scale, shift)
