"""Prompt types and the sampling parameters of diffusion stages."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypeAlias

from typing_extensions import TypedDict

from vllm_omni.config.schema import nearest
from vllm_omni.errors import RequestError

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams


class OmniTextPrompt(TypedDict):
    """A prompt with optional parts. Every stage reads the keys it knows; an unknown key is an error."""

    prompt: str
    """The text; may be empty where media or ``additional_information`` carry the request."""
    negative_prompt: NotRequired[str]
    """What the picture should not show; switches classifier-free guidance on where the model has it."""
    multi_modal_data: NotRequired[Mapping[str, Any]]
    """Media by modality: ``image``, ``video``, ``audio``; one value or a list."""
    mm_processor_kwargs: NotRequired[Mapping[str, Any]]
    """Arguments of the media processor of autoregressive stages."""
    additional_information: NotRequired[Mapping[str, Any]]
    """Named tensors and plain values for the model, as made by an earlier stage."""
    lora_request: NotRequired[Any]
    """vLLM's ``LoRARequest``: the adapter to use (autoregressive stages)."""
    priority: NotRequired[int]
    """Order among the requests of a stage whose ``scheduling_policy`` is ``priority``: smaller numbers first."""


class OmniTokensPrompt(TypedDict):
    """A prompt that is already token ids (autoregressive stages)."""

    prompt_token_ids: list[int]
    multi_modal_data: NotRequired[Mapping[str, Any]]
    additional_information: NotRequired[Mapping[str, Any]]
    lora_request: NotRequired[Any]
    priority: NotRequired[int]


class OmniEnginePrompt(TypedDict):
    """A prompt that vLLM's renderer has made already (autoregressive stages): what the HTTP server hands on."""

    engine_input: Mapping[str, Any]
    """vLLM's ``EngineInput``."""
    additional_information: NotRequired[Mapping[str, Any]]
    lora_request: NotRequired[Any]
    """vLLM's ``LoRARequest``: the adapter to use."""
    priority: NotRequired[int]
    reasoning_ended: NotRequired[bool]
    """Whether a grammar binds the answer from its first token."""
    reasoning_parser_kwargs: NotRequired[Mapping[str, Any]]
    """What the engine's own reasoning parser is built with."""


OmniPromptType: TypeAlias = str | OmniTextPrompt | OmniTokensPrompt | OmniEnginePrompt


@dataclass
class OmniDiffusionSamplingParams:
    """How one diffusion request is sampled.

    ``None`` means the model's own default (``vllm-omni models`` prints them). A field that the model does not honour is
    refused with a ``RequestError`` when it is set; nothing is ignored.
    """

    height: int | None = None
    """Height of the picture in pixels."""
    width: int | None = None
    """Width of the picture in pixels."""
    num_inference_steps: int | None = None
    """Number of denoising steps."""
    guidance_scale: float | None = None
    """Strength of distilled (embedded) guidance, or of classifier-free guidance where the model has only that."""
    true_cfg_scale: float | None = None
    """Strength of classifier-free guidance with a negative prompt; 1 and below switch it off."""
    guidance_scale_2: float | None = None
    """Guidance of the low-noise expert of two-expert models."""
    seed: int | None = None
    """Seed of the initial noise; without it a random one is drawn and reported in the output's metrics."""
    generator: torch.Generator | list[torch.Generator] | None = None
    """Generator(s) to draw the noise from instead of ``seed``; a list gives one to each output."""
    generator_device: Literal["cpu", "cuda"] = "cpu"
    """Where noise from ``seed`` is drawn: ``cpu`` gives the same picture on every machine."""
    num_outputs_per_prompt: int = 1
    """Pictures made from one prompt."""
    max_sequence_length: int | None = None
    """Text tokens kept of the prompt."""
    sigmas: list[float] | None = None
    """Noise levels to use instead of the schedule's own; their count is the number of steps."""
    latents: torch.Tensor | None = None
    """Initial noise, packed as the model packs its latents, instead of drawing it."""
    output_type: Literal["pil", "np", "pt", "latent"] = "pil"
    """Form of the pictures: PIL images, float arrays or tensors in [0, 1], or the final latents."""
    return_trajectory_latents: bool = False
    """Also return the latents after every step."""
    num_previews: int = 0
    """Small pictures of what is being made, handed to ``on_preview`` between the steps: so many, evenly spaced, but
    at most one a step."""
    num_frames: int | None = None
    """Frames of a video."""
    fps: int | None = None
    """Frames per second of a video."""
    lora_request: Any | None = None
    """LoRA adapter to use for this request."""
    lora_scale: float | None = None
    """Strength of the adapter."""
    extra_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of one model alone; a key that it does not read is an error."""

    @property
    def batch_size(self) -> int:
        """Pictures of one request."""
        return self.num_outputs_per_prompt

    def clone(self) -> OmniDiffusionSamplingParams:
        """A copy that shares tensors and generators."""
        return copy.copy(self)

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> OmniDiffusionSamplingParams:
        """Build from loose keyword arguments.

        Raises:
            RequestError: an unknown name; the message holds the nearest known one.
        """
        known = {f.name for f in fields(cls)}
        for name in kwargs:
            if name not in known:
                hint = _RENAMED.get(name) or nearest(name, known)
                raise RequestError(f"unknown sampling parameter {name!r}{hint}", field=name)
        return cls(**kwargs)

    def validate(self) -> None:
        """Check what does not depend on the model.

        Raises:
            RequestError: names the field, its value and what is allowed.
        """
        for name, low, high in _BOUNDS:
            value = getattr(self, name)
            if value is None:
                continue
            kind = float if name in _FLOATS else int
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
                raise RequestError(f"{name}={value!r}: expected {kind.__name__}", field=name, value=repr(value))
            if not low <= value <= high:
                raise RequestError(f"{name}={value}: allowed is {low} to {high}", field=name, value=value)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise RequestError(
                    f"{name}={getattr(self, name)!r}: allowed are {', '.join(allowed)}", field=name, allowed=allowed
                )
        self._check_objects()
        if self.sigmas is not None and self.num_inference_steps not in (None, len(self.sigmas)):
            raise RequestError(
                f"num_inference_steps={self.num_inference_steps} but sigmas has {len(self.sigmas)} values",
                field="sigmas",
            )
        if isinstance(self.generator, list) and len(self.generator) != self.num_outputs_per_prompt:
            raise RequestError(
                f"generator has {len(self.generator)} entries but num_outputs_per_prompt={self.num_outputs_per_prompt}",
                field="generator",
            )

    def _check_objects(self) -> None:
        sigmas = self.sigmas
        if sigmas is not None and not (isinstance(sigmas, (list, tuple)) and sigmas and all(map(_is_number, sigmas))):
            raise RequestError(f"sigmas={sigmas!r}: expected a list of at least one number", field="sigmas")
        if not isinstance(self.extra_args, Mapping):
            raise RequestError(f"extra_args={self.extra_args!r}: expected names and values", field="extra_args")
        if not isinstance(self.return_trajectory_latents, bool):
            raise RequestError(
                f"return_trajectory_latents={self.return_trajectory_latents!r}: expected bool",
                field="return_trajectory_latents",
            )
        if self.latents is None and self.generator is None:
            return  # and torch need not be imported
        import torch

        if self.latents is not None and not isinstance(self.latents, torch.Tensor):
            raise RequestError(f"latents are {type(self.latents).__name__}; expected a tensor", field="latents")
        generators = self.generator if isinstance(self.generator, list) else [self.generator]
        for generator in generators:
            if not isinstance(generator, torch.Generator) and self.generator is not None:
                raise RequestError(
                    f"generator={generator!r}: expected a torch.Generator, or a list of them", field="generator"
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_CHOICES = {"output_type": ("pil", "np", "pt", "latent"), "generator_device": ("cpu", "cuda")}
_FLOATS = ("guidance_scale", "true_cfg_scale", "guidance_scale_2", "lora_scale")
_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("height", 16, 16384),
    ("width", 16, 16384),
    ("num_inference_steps", 1, 1000),
    ("guidance_scale", 0.0, 100.0),
    ("true_cfg_scale", 0.0, 100.0),
    ("guidance_scale_2", 0.0, 100.0),
    ("seed", -(2**63), 2**64 - 1),
    ("num_outputs_per_prompt", 1, 64),
    ("max_sequence_length", 1, 8192),
    ("num_previews", 0, 1000),
    ("num_frames", 1, 4096),
    ("fps", 1, 240),
    ("lora_scale", -10.0, 10.0),
)
_RENAMED = {
    "max_batch_size": "; requests are batched by the engine, set max_num_seqs on Omni instead",
    "device_map": "; not used here, devices come from the stage configuration",
    "num_images_per_prompt": "; use num_outputs_per_prompt",
    "negative_prompt": '; put it into the prompt: {"prompt": ..., "negative_prompt": ...}',
}

OmniSamplingParams: TypeAlias = "OmniDiffusionSamplingParams | SamplingParams"
OmniSamplingParamsList: TypeAlias = Sequence[OmniSamplingParams]
