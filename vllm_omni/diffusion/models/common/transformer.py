"""The shape of every DiT: ``embed -> run_blocks -> head`` over one ``Streams`` value."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.layers.linear import StackedLinear
from vllm_omni.diffusion.layers.rope import RotaryEmbedding
from vllm_omni.diffusion.models.common.weights import WeightsMapper, load_strictly


@dataclass(frozen=True)
class DiTInputs:
    """One forward of a transformer. B pictures, S latent tokens, T text tokens, M numbers of modulation."""

    latents_BSC: torch.Tensor
    """Noisy latents, packed."""
    text_BTD: torch.Tensor
    """Text states, padded at the end where texts differ in length."""
    modulation_BM: torch.Tensor
    """What ``modulate`` made for this timestep; one row serves all pictures."""
    grid: tuple[int, ...]
    """Latent grid in tokens."""
    text_lengths: tuple[int, ...] | None = None
    """Tokens that count of each text; None when all do."""


@dataclass(frozen=True)
class RopeTables:
    """Rotary tables of the picture's tokens, of the text's, and of both in that order (the first two are views)."""

    img: RotaryEmbedding
    txt: RotaryEmbedding
    joint: RotaryEmbedding

    @classmethod
    def from_joint(cls, joint: RotaryEmbedding, img_tokens: int, device: torch.device) -> RopeTables:
        """Split the table of all tokens, on ``device``."""
        joint = joint.to(device)
        return cls(joint.part(0, img_tokens), joint.part(img_tokens, joint.cos.shape[0]), joint)


@dataclass(frozen=True)
class Streams:
    """All that a block may need."""

    img_BSD: torch.Tensor
    txt_BTD: torch.Tensor
    modulation_BM: torch.Tensor
    rope: RopeTables
    attention: AttentionMetadata | None


@functools.lru_cache(maxsize=256)
def joint_metadata(
    text_lengths: tuple[int, ...] | None, text_tokens: int, img_tokens: int, device: torch.device
) -> AttentionMetadata | None:
    """Which keys of [picture, text] count; None when all do. Kept, so that a step copies nothing to the device."""
    if text_lengths is None or all(length == text_tokens for length in text_lengths):
        return None
    lengths_B = torch.tensor([img_tokens + length for length in text_lengths], dtype=torch.int32)
    return AttentionMetadata.first_keys(lengths_B.to(device), img_tokens + text_tokens)


class DiTModel(nn.Module, ABC):
    """Base of the package's transformers.

    A family states the tables and writes ``embed``, ``run_blocks``, ``head`` and ``time_embedding``. Modulation depends
    on the timestep (and pooled text, guidance) and never on the latents, so it is no part of the forward: ``modulate``
    makes it for many timesteps at once, which reads its weights once a request in place of once a step.
    """

    weights_mapper: ClassVar[WeightsMapper]
    """Names of the released checkpoint to ours."""
    _repeated_blocks: ClassVar[list[str]]
    """Classes of the blocks that repeat: what compilation and offload work on."""
    _sp_plan: ClassVar[Mapping[str, Mapping[str, int]]]
    """Fields of ``Streams`` that sequence parallelism splits before the blocks, and gathers after, by axis."""

    modulation: StackedLinear
    """The modulation linears of all blocks."""

    @abstractmethod
    def embed(self, inputs: DiTInputs) -> Streams:
        """Project latents and text to the model's width."""

    @abstractmethod
    def run_blocks(self, streams: Streams) -> Streams:
        """All blocks in order."""

    @abstractmethod
    def head(self, streams: Streams) -> torch.Tensor:
        """Final norm and projection of the picture's tokens, [B, S, C]."""

    @abstractmethod
    def time_embedding(
        self, timesteps_N: torch.Tensor, pooled_BD: torch.Tensor | None, guidance_B: torch.Tensor | None
    ) -> torch.Tensor:
        """Conditioning of the modulation, [N, B, D], or [N, 1, D] where no picture has its own."""

    @abstractmethod
    def scale_columns(self) -> torch.Tensor:
        """Bool [M], True where a modulation number is a scale, to which one is added."""

    def forward(self, inputs: DiTInputs) -> torch.Tensor:
        """Predicted velocity, [B, S, C]."""
        return self.head(self.run_blocks(self.embed(inputs)))

    def modulate(
        self,
        timesteps_N: torch.Tensor,
        pooled_BD: torch.Tensor | None = None,
        guidance_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Modulation of all blocks for each of N timesteps, [N, B or 1, M]; scales are already ``1 + scale``.

        Args:
            timesteps_N: timesteps as the scheduler counts them (0 to 1000), float32.
            pooled_BD: pooled text of each picture, for models that take it.
            guidance_B: embedded guidance of each picture, float32, for models that take it.
        """
        embedding_NBD = self.time_embedding(timesteps_N, pooled_BD, guidance_B)
        out: torch.Tensor = self.modulation(nn.functional.silu(embedding_NBD))
        return out + self._scale_ones.to(out.dtype)

    @functools.cached_property
    def _scale_ones(self) -> torch.Tensor:
        return self.scale_columns().to(self.modulation.weight.device, self.modulation.weight.dtype)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a released checkpoint; every tensor must have a place and every parameter must come.

        Raises:
            ConfigError: lists the names that do not fit.
        """
        return load_strictly(self, weights, self.weights_mapper, type(self).__name__)
