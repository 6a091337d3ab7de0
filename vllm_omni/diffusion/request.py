"""The request that a diffusion pipeline works on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_omni.inputs.data import OmniDiffusionSamplingParams


@dataclass
class OmniDiffusionRequest:
    """One or more prompts with one set of sampling parameters.

    The engine always makes requests of one prompt, so that each joins and leaves the batch by itself; a caller of
    ``pipeline.forward`` may pass several.
    """

    prompts: list[Any]
    """Text, or dictionaries as in ``OmniTextPrompt``."""
    sampling_params: OmniDiffusionSamplingParams
    """How to sample; defaults of the model are filled in by the pipeline."""
    request_ids: list[str] = field(default_factory=list)
    """One id a prompt."""

    def texts(self) -> list[str]:
        """The text of each prompt."""
        return [p if isinstance(p, str) else (p.get("prompt") or "") for p in self.prompts]

    def negative_texts(self) -> list[str | None]:
        """The negative prompt of each prompt, None where there is none."""
        return [None if isinstance(p, str) else p.get("negative_prompt") for p in self.prompts]

    def media(self, name: str) -> list[Any]:
        """The medium ``name`` of each prompt, None where there is none."""
        return [None if isinstance(p, str) else (p.get("multi_modal_data") or {}).get(name) for p in self.prompts]
