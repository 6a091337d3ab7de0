"""PyTorch's scaled_dot_product_attention: runs everywhere, takes any mask."""

from __future__ import annotations

import torch
from torch.nn import functional

from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionMetadata, broadcast_mask


class SDPABackend(AttentionBackend):
    """torch's own kernels; it picks among flash, cuDNN, memory-efficient and plain by itself."""

    name = "SDPA"

    @classmethod
    def why_not(cls, device_type: str, dtype: torch.dtype, head_size: int) -> str | None:
        """Always usable."""
        return None

    def forward(
        self, q_BQHD: torch.Tensor, k_BKHD: torch.Tensor, v_BKHD: torch.Tensor, metadata: AttentionMetadata | None
    ) -> torch.Tensor:
        """See ``AttentionBackend.forward``."""
        mask = None if metadata is None or metadata.attn_mask is None else broadcast_mask(metadata.attn_mask)
        out_BHQD = functional.scaled_dot_product_attention(
            q_BQHD.transpose(1, 2),
            k_BKHD.transpose(1, 2),
            v_BKHD.transpose(1, 2),
            attn_mask=mask,
            is_causal=self.causal,
            scale=self.softmax_scale,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return out_BHQD.transpose(1, 2)
