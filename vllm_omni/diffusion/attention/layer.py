"""The attention layer that every diffusion model uses."""

from __future__ import annotations

import torch
from torch import nn

from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.selector import get_attn_backend
from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available


class Attention(nn.Module):
    """Scaled dot-product attention over [B, S, H, D] on the backend of the stage.

    Args:
        num_heads: query heads on this rank.
        head_size: width of a head.
        softmax_scale: factor on the scores; default 1 / sqrt(head_size).
        causal: whether a query sees earlier keys alone.
        num_kv_heads: key and value heads on this rank; default as many as query heads.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        od_config = get_forward_context().od_config if is_forward_context_available() else None
        backend = get_attn_backend(od_config, head_size, torch.get_default_dtype())
        self.backend = backend(
            num_heads,
            head_size,
            head_size**-0.5 if softmax_scale is None else softmax_scale,
            causal,
            num_heads if num_kv_heads is None else num_kv_heads,
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [B, queries, heads, head_size].
            key: [B, keys, kv heads, head_size].
            value: as ``key``.
            attn_metadata: which keys count; None for all.

        Returns:
            [B, queries, heads, head_size].
        """
        return self.backend.forward(query, key, value, attn_metadata)

    def extra_repr(self) -> str:
        """Backend and shape, for printing a model."""
        return f"{self.backend.name}, heads={self.backend.num_heads}, head_size={self.backend.head_size}"
