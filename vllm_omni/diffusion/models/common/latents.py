"""Latents: drawn, packed into tokens, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pack_2x2(latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Patches of 2 x 2 latents as tokens: [B, C, H, W] to [B, H/2 * W/2, 4 C], channel order (c, row, column)."""
    batch, channels, height, width = latents_BCHW.shape
    patches = latents_BCHW.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack_2x2(tokens_BSC: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Inverse of ``pack_2x2`` for a grid of (rows, columns) of tokens."""
    batch, _, channels = tokens_BSC.shape
    rows, columns = grid
    patches = tokens_BSC.view(batch, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, rows * 2, columns * 2)


def draw_noise(
    shape: tuple[int, ...],
    generators: Sequence[torch.Generator],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Normal noise on ``device``, drawn where the generators are and in ``dtype``, as diffusers draws it.

    One generator draws the whole of ``shape``; several draw one row each.
    """
    if len(generators) == 1:
        return _draw(shape, generators[0], dtype).to(device)
    return torch.cat([_draw((1, *shape[1:]), generator, dtype) for generator in generators]).to(device)


def _draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
