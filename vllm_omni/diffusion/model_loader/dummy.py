"""Random weights for a model that is to be run, not looked at: timings, memory, plumbing."""

from __future__ import annotations

import zlib

import torch
from torch import nn

_SEED = 20250805


def init_dummy_weights(module: nn.Module, seed: int = _SEED) -> None:
    """Fill every parameter with reproducible random numbers, on the device that it lives on.

    Matrices get N(0, 1/fan_in), so that activations keep their size; the rest gets small noise, around one where it
    scales a norm. Each parameter has a generator of its own, so the values do not depend on the order of modules. Under
    tensor parallelism every rank fills its slice with the same numbers: a consistent model, but another one than that
    of one rank.
    """
    for owner_name, owner in module.named_modules():
        for name, param in owner.named_parameters(recurse=False):
            full_name = f"{owner_name}.{name}"
            generator = torch.Generator(param.device).manual_seed(seed ^ zlib.crc32(full_name.encode()))
            scales = name == "gamma" or (
                name == "weight" and (param.dim() < 2 or "norm" in type(owner).__name__.lower())
            )
            with torch.no_grad():
                if scales:
                    param.normal_(1.0, 0.02, generator=generator)
                elif param.dim() < 2:
                    param.normal_(0.0, 0.02, generator=generator)
                else:
                    param.normal_(0.0, param[0].numel() ** -0.5, generator=generator)
