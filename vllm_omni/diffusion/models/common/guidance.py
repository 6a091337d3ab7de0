"""Classifier-free guidance (Ho and Salimans 2022): how two predictions become one."""

from __future__ import annotations

import torch


def plain_cfg(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """negative + scale (positive - negative)."""
    return negative + scale * (positive - negative)


def norm_preserving_cfg(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """Plain guidance with each token scaled back to the length that it has in the positive prediction (Qwen-Image)."""
    combined = plain_cfg(positive, negative, scale)
    return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
