"""What an attention backend is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionMetadata:
    """Which keys a query may see, beyond causality. Empty: all of them.

    ``key_lengths_B`` and ``attn_mask`` may both be given and then mean the same: a backend takes the form it can use.
    """

    attn_mask: torch.Tensor | None = None
    """Bool, True where a key counts: [B, keys], or anything that broadcasts to [B, heads, queries, keys]."""
    key_lengths_B: torch.Tensor | None = None
    """Number of keys that count, from the first on, int32 [B]."""

    @classmethod
    def first_keys(cls, lengths_B: torch.Tensor, keys: int) -> AttentionMetadata:
        """Metadata by which only the first ``lengths_B[b]`` of ``keys`` keys count."""
        mask_BK = torch.arange(keys, device=lengths_B.device)[None, :] < lengths_B[:, None]
        return cls(attn_mask=mask_BK, key_lengths_B=lengths_B.to(torch.int32))


class AttentionBackend(ABC):
    """Kernels behind ``Attention``: built once a layer, called in every step."""

    name: str

    def __init__(self, num_heads: int, head_size: int, softmax_scale: float, causal: bool, num_kv_heads: int) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.softmax_scale = softmax_scale
        self.causal = causal
        self.num_kv_heads = num_kv_heads

    @classmethod
    @abstractmethod
    def why_not(cls, device_type: str, dtype: torch.dtype, head_size: int) -> str | None:
        """Why the backend cannot run such a layer here, or None when it can."""

    @abstractmethod
    def forward(
        self, q_BQHD: torch.Tensor, k_BKHD: torch.Tensor, v_BKHD: torch.Tensor, metadata: AttentionMetadata | None
    ) -> torch.Tensor:
        """softmax(q k^T * scale) v, [B, queries, heads, head_size]."""


def broadcast_mask(mask: torch.Tensor) -> torch.Tensor:
    """A mask in the form that broadcasts to [B, heads, queries, keys]."""
    return mask[:, None, None, :] if mask.dim() == 2 else mask
