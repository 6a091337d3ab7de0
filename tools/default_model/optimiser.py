"""Muon for the matrices of the blocks and AdamW for the rest, and a schedule by the wall clock."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices of a stack (N, R, C) by Newton-Schulz steps (Jordan et al., Muon, 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon:
    """Momentum whose update is made orthogonal, for stacks of equally shaped matrices; a kernel is (out, the rest)."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01):
        self.lr, self.momentum, self.decay = lr, momentum, decay
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(tuple(parameter.shape), []).append(parameter)
        self._stacks = [
            (group, torch.zeros(len(group), *group[0].flatten(1).shape, device=group[0].device))
            for group in shapes.values()
        ]

    @torch.no_grad()
    def step(self, scale: Tensor) -> None:
        """Update with the learning rate times scale, a scalar on the parameters' device."""
        lr = self.lr * scale
        for group, velocity in self._stacks:
            gradient = torch.stack([gradient_of(p).flatten(1) for p in group])
            velocity.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp_(velocity, self.momentum))
            rows, columns = update.shape[-2:]
            update *= -lr * math.sqrt(max(1.0, rows / columns))
            torch._foreach_mul_(group, 1 - lr * self.decay)
            torch._foreach_add_(group, [part.view(p.shape) for part, p in zip(update.unbind(), group, strict=True)])

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the momentum."""
        for _, velocity in self._stacks:
            velocity.zero_()


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter.

    Raises:
        ValueError: if it has none.
    """
    if parameter.grad is None:
        raise ValueError("a parameter without a gradient")
    return parameter.grad


class Clock:
    """A schedule that ends with the time budget however fast the machine is."""

    def __init__(self, seconds: float, warmup: int = 100, final: float = 0.01) -> None:
        self._seconds, self._warmup, self._final = seconds, warmup, final
        self._start = time.monotonic()
        self._steps = 0

    def restart(self, deadline: float = math.inf) -> None:
        """Begin the time now (after compilation) and let it end at the deadline, as time.monotonic counts, at most."""
        self._start = time.monotonic()
        self._seconds = max(min(self._seconds, deadline - self._start), 1.0)

    @property
    def share(self) -> float:
        """Share of the budget that has passed."""
        return (time.monotonic() - self._start) / self._seconds

    def scale(self) -> float:
        """Factor of the learning rate for the next step: a linear warm-up, then half a cosine down."""
        self._steps += 1
        cosine = self._final + (1 - self._final) * 0.5 * (1 + math.cos(math.pi * min(self.share, 1.0)))
        return min(1.0, self._steps / self._warmup) * cosine


class Average:
    """Exponential moving average of parameters."""

    def __init__(self, parameters: list[nn.Parameter], decay: float = 0.998) -> None:
        self._parameters, self._decay = parameters, decay
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters' present values in."""
        torch._foreach_lerp_(self.values, [p.detach() for p in self._parameters], 1 - self._decay)

    @torch.no_grad()
    def install(self) -> None:
        """Put the average in the parameters' place."""
        for parameter, value in zip(self._parameters, self.values, strict=True):
            parameter.copy_(value)


def split_matrices(named: Iterable[tuple[str, nn.Parameter]]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters for Muon (weights of linear layers inside blocks, but for modulation) and the others."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            in_block = "layers." in name or "transformer_blocks." in name
            is_matrix = in_block and parameter.ndim == 2 and "_mod." not in name
            (matrices if is_matrix else others).append(parameter)
    return matrices, others
