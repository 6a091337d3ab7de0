"""What the runner expects of a pipeline.

Two kinds are accepted. A pipeline with the four verbs (every family of this package, by way of
``models.common.pipeline.DiTPipeline``) is run step by step and batched with other requests. A pipeline that has only
``forward(req)``, or that overrides ``DiTPipeline.forward`` (custom pipelines), is run whole, one request at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from vllm_omni.diffusion.data import DiffusionOutput
from vllm_omni.diffusion.models.common.state import Branches, DenoiseState
from vllm_omni.diffusion.request import OmniDiffusionRequest


class DiffusionPipeline(Protocol):
    """The least a pipeline has: ``forward``."""

    def forward(self, req: OmniDiffusionRequest) -> DiffusionOutput:
        """Make the pictures of one request."""


@runtime_checkable
class SupportImageInput(Protocol):
    """A pipeline that reads pictures beside the text: ``multi_modal_data["image"]`` of a prompt, one or a list."""

    support_image_input: bool
    """Whether it does."""


@runtime_checkable
class SupportsPreviews(Protocol):
    """A pipeline that can show between two steps what it is making."""

    def preview(self, state: DenoiseState) -> torch.Tensor | None:
        """Small pictures, [B, 3, h, w] in [-1, 1], after a step of ``state.preview_steps``; else None."""


@runtime_checkable
class SupportsStepExecution(Protocol):
    """A pipeline that can be run step by step."""

    def check(self, req: OmniDiffusionRequest) -> OmniDiffusionRequest:
        """Resolve defaults and check sizes, without touching the device; raises ``RequestError``."""

    def encode(self, req: OmniDiffusionRequest) -> Branches:
        """Text (and image) encoders."""

    def prepare(self, req: OmniDiffusionRequest, cond: Branches) -> DenoiseState:
        """Initial noise, schedule and everything that stays the same over the steps."""

    def denoise_step(self, states: Sequence[DenoiseState]) -> None:
        """One step of every state, in one forward; all have the same ``batch_key()`` and none is done."""

    def decode(self, state: DenoiseState) -> DiffusionOutput:
        """Latents to pictures."""
