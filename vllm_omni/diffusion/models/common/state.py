"""What travels through a pipeline's verbs: conditioning, guidance and the state of one request's denoising.

State lives here, in the request, and never in a module: so requests with different steps, seeds and scales can be
denoised in one batch, stopped between steps, and resumed.

Shapes: B pictures of one request, S latent tokens, C channels of a token, T text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Conditioning:
    """One branch's conditioning of one request. Every tensor has the batch first, so that requests can be stacked."""

    text_BTD: torch.Tensor
    """Text states; a text shorter than T is padded at the end."""
    text_lengths: tuple[int, ...] | None = None
    """Tokens that count of each text; None when all do."""
    pooled_BD: torch.Tensor | None = None
    """Pooled text, for models that modulate with it."""
    counts: tuple[int, ...] | None = None
    """Tokens of each text by itself, for who pays by them; None where the family does not tell."""
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    """Further tensors of one family by name, batch first."""

    def lengths(self) -> tuple[int, ...]:
        """Tokens that count of each text."""
        return self.text_lengths or (self.text_BTD.shape[1],) * self.text_BTD.shape[0]

    def repeat(self, copies: int) -> Conditioning:
        """Every row ``copies`` times in succession: several pictures of one prompt."""
        if copies == 1:
            return self
        return Conditioning(
            text_BTD=self.text_BTD.repeat_interleave(copies, dim=0),
            text_lengths=None
            if self.text_lengths is None
            else tuple(length for length in self.text_lengths for _ in range(copies)),
            pooled_BD=None if self.pooled_BD is None else self.pooled_BD.repeat_interleave(copies, dim=0),
            counts=None if self.counts is None else tuple(count for count in self.counts for _ in range(copies)),
            extras={name: tensor.repeat_interleave(copies, dim=0) for name, tensor in self.extras.items()},
        )


@dataclass(frozen=True)
class Branches:
    """What ``encode`` returns: the positive branch and, with classifier-free guidance, the negative one."""

    positive: Conditioning
    negative: Conditioning | None = None

    def get(self, name: Literal["positive", "negative"]) -> Conditioning:
        """The branch ``name``, which must be there."""
        branch = self.positive if name == "positive" else self.negative
        assert branch is not None
        return branch


@dataclass
class DenoiseState:
    """One request between its first and its last denoise step."""

    request_id: str
    latents: torch.Tensor
    """[B, S, C], packed as the transformer takes them; float32 or the model's dtype, as the reference has it."""
    sigmas: torch.Tensor
    """[steps + 1] noise levels, the last one 0, float32 on the CPU."""
    timesteps: torch.Tensor
    """[steps] what the transformer is told, float32 on the CPU."""
    branches: Branches
    grid: tuple[int, ...]
    """Latent grid in tokens: (rows, columns), or (frames, rows, columns)."""
    size: tuple[int, int]
    """Height and width of the result in pixels."""
    guidance_scale: float | None = None
    """Embedded guidance; None for models without."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; used when there is a negative branch."""
    step_index: int = 0
    """Steps done."""
    prompt_tokens: int | None = None
    """Tokens of the prompts by themselves; None where the family does not tell."""
    seed: int | None = None
    """The seed the noise was drawn from, when it was."""
    keep_trajectory: bool = False
    trajectory: list[torch.Tensor] = field(default_factory=list)
    """Latents after each step when ``keep_trajectory``."""
    preview_steps: frozenset[int] = frozenset()
    """Steps (counted from 1) after which a preview is wanted."""
    foreseen: torch.Tensor | None = None
    """The clean latents that such a step predicted, packed like ``latents``; until the preview is made."""
    output_type: str = "pil"
    """Form that the result is asked for in; ``latent`` ends the work before the VAE."""
    scratch: dict[str, Any] = field(default_factory=dict)
    """What the pipeline keeps between steps (tables for the coming timesteps); of no meaning to others."""
    layout: Hashable = None
    """Whatever else of the family must agree for two requests to share a forward."""

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return len(self.timesteps)

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.step_index >= self.num_steps

    def token_counts(self) -> dict[str, int]:
        """Tokens that went in and came out, as ``metrics`` name them; empty where the family does not tell."""
        if self.prompt_tokens is None:
            return {}
        return {"prompt_tokens": self.prompt_tokens, "output_tokens": self.latents.shape[0] * self.latents.shape[1]}

    def batch_key(self) -> Hashable:
        """Requests with equal keys can share one forward: same latent grid and the same set of branches.

        Step index, step count, seed, scales and text length may differ.
        """
        return (
            self.latents.shape[1:],
            self.grid,
            self.branches.negative is not None,
            self.guidance_scale is None,
            self.layout,
        )
