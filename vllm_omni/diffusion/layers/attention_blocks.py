"""Attention of DiT blocks, tensor-parallel inside.

Joint attention puts the picture's tokens first and the text's after them, so that padding of shorter texts lies at the
end of the keys and a length says all that a mask would (the order of keys does not change the result).
"""

from __future__ import annotations

import torch
from torch import nn

from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.distributed.parallel_state import get_tp_world_size
from vllm_omni.diffusion.layers.linear import qkv_linear, row_linear
from vllm_omni.diffusion.layers.norm import QKNorm
from vllm_omni.diffusion.layers.rope import RotaryEmbedding, apply_rope


def normed_qkv(
    qkv_BSX: torch.Tensor, norm: QKNorm, rope: RotaryEmbedding, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a fused projection, normalise and turn queries and keys.

    Returns:
        Queries and keys side by side, [B, S, 2, H, D], and values, [B, S, H, D].
    """
    qkv_BS3HD = qkv_BSX.unflatten(-1, (3, -1, head_size))
    return apply_rope(norm(qkv_BS3HD[:, :, :2]), rope), qkv_BS3HD[:, :, 2]


class JointAttention(nn.Module):
    """Attention over picture and text together, each with its own projections (MMDiT, Esser et al. 2024).

    Args:
        dim: width of the model.
        num_heads: heads in all; each tensor-parallel rank has its share.
        head_size: width of a head.
    """

    def __init__(self, dim: int, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.qkv = qkv_linear(dim, head_size, num_heads)
        self.norm = QKNorm(head_size)
        self.to_out = row_linear(num_heads * head_size, dim)
        self.add_qkv = qkv_linear(dim, head_size, num_heads)
        self.norm_added = QKNorm(head_size)
        self.to_add_out = row_linear(num_heads * head_size, dim)
        self.attn = Attention(num_heads // get_tp_world_size(), head_size)

    def forward(
        self,
        img_BSD: torch.Tensor,
        txt_BTD: torch.Tensor,
        rope_img: RotaryEmbedding,
        rope_txt: RotaryEmbedding,
        metadata: AttentionMetadata | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attended picture [B, S, D] and text [B, T, D]."""
        img_qk, img_v = normed_qkv(self.qkv(img_BSD), self.norm, rope_img, self.head_size)
        txt_qk, txt_v = normed_qkv(self.add_qkv(txt_BTD), self.norm_added, rope_txt, self.head_size)
        qk = torch.cat((img_qk, txt_qk), dim=1)
        v = torch.cat((img_v, txt_v), dim=1)
        out = self.attn(qk[:, :, 0], qk[:, :, 1], v, metadata).flatten(2)
        img_out, txt_out = out.split((img_BSD.shape[1], txt_BTD.shape[1]), dim=1)
        return self.to_out(img_out), self.to_add_out(txt_out)
