"""Norms of DiT blocks and what modulation does to them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def modulated_norm(x_BSD: torch.Tensor, one_plus_scale_B1D: torch.Tensor, shift_B1D: torch.Tensor) -> torch.Tensor:
    """LayerNorm without weights, then ``x * (1 + scale) + shift`` (AdaLN, Peebles and Xie 2023)."""
    normed = functional.layer_norm(x_BSD, (x_BSD.shape[-1],), eps=1e-6)
    return torch.addcmul(shift_B1D, normed, one_plus_scale_B1D)


def gated_residual(x_BSD: torch.Tensor, gate_B1D: torch.Tensor, update_BSD: torch.Tensor) -> torch.Tensor:
    """``x + gate * update``, kept inside the range of float16 where that is the dtype."""
    out = torch.addcmul(x_BSD, gate_B1D, update_BSD)
    return out.clip(-65504, 65504) if out.dtype == torch.float16 else out


class QKNorm(nn.Module):
    """RMSNorm of each head of queries and keys, both at once.

    Args:
        head_size: width of a head.
        eps: added to the mean square.
    """

    def __init__(self, head_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(2, head_size), requires_grad=False)
        vars(self.weight).update(omni_shards=("q", "k"), weight_loader=self._load)

    def _load(self, param: nn.Parameter, tensor: torch.Tensor, part: str) -> None:
        if tensor.shape != param.shape[1:]:
            raise ValueError(f"shape {list(tensor.shape)} where {list(param.shape[1:])} belongs")
        param.data["qk".index(part)].copy_(tensor)

    def forward(self, qk_BS2HD: torch.Tensor) -> torch.Tensor:
        """Normalise [B, S, (query, key), H, D]."""
        normed = functional.rms_norm(qk_BS2HD, (qk_BS2HD.shape[-1],), eps=self.eps)
        return normed * self.weight[:, None, :]


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019).

    The mean square is taken in float32; the weight multiplies after rounding to the weight's dtype, as in diffusers.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        return functional.rms_norm(x, (x.shape[-1],), eps=self.eps) * self.weight
