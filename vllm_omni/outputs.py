"""What a caller gets: ``OmniRequestOutput``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.outputs import RequestOutput


@dataclass(frozen=True)
class Preview:
    """What a picture request is going to become, as far as can be told after one of its steps."""

    step: int
    """Steps done."""
    total: int
    """Steps in all."""
    images: Any
    """[B, h, w, 3] uint8: one small picture for each that is being made."""
    size: tuple[int, int]
    """Width and height of the pictures that are being made."""

    def pictures(self) -> list[Any]:
        """PIL images of full size."""
        from PIL import Image

        bicubic = Image.Resampling.BICUBIC
        return [Image.fromarray(picture).resize(self.size, bicubic) for picture in self.images]


@dataclass
class OmniRequestOutput:
    """One output of one request: of a stage that makes text, pictures, sound or video.

    A picture result can be read in three ways, all of which users of the field have: ``out.images``,
    ``out.request_output[0].images`` and ``out.outputs[0]``.
    """

    request_id: str = ""
    """The caller's id of the request."""
    finished: bool = True
    """Whether this is the request's last output of this stage."""
    stage_id: int | None = None
    """The stage that made it."""
    final_output_type: str = "text"
    """``text``, ``image``, ``audio``, ``video`` or ``latents``."""
    request_output: RequestOutput | list[OmniRequestOutput] | None = None
    """Autoregressive stages: vLLM's own output. Diffusion stages: a list that holds this output itself."""
    images: list[Any] = field(default_factory=list)
    """Pictures: PIL images, or arrays / tensors as ``output_type`` asked."""
    prompt: Any = None
    """The prompt as the caller gave it."""
    latents: torch.Tensor | None = None
    """Final latents (``output_type="latent"``) or the trajectory that was asked for."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Times in seconds by stage and phase, the seed used, step counts, and what a custom pipeline reports."""
    multimodal_output: dict[str, Any] = field(default_factory=dict)
    """Other media by name: ``audio`` with ``sr``, ``video`` with ``fps``."""

    @classmethod
    def from_diffusion(
        cls,
        request_id: str,
        images: list[Any],
        prompt: Any = None,
        metrics: dict[str, Any] | None = None,
        latents: torch.Tensor | None = None,
        multimodal_output: dict[str, Any] | None = None,
        final_output_type: str = "image",
        stage_id: int | None = None,
    ) -> OmniRequestOutput:
        """Output of a diffusion stage."""
        out = cls(
            request_id=request_id,
            stage_id=stage_id,
            final_output_type=final_output_type,
            images=images,
            prompt=prompt,
            latents=latents,
            metrics=metrics or {},
            multimodal_output=multimodal_output or {},
        )
        out.request_output = [out]
        return out

    @classmethod
    def from_pipeline(cls, stage_id: int, final_output_type: str, request_output: RequestOutput) -> OmniRequestOutput:
        """Output of an autoregressive stage."""
        return cls(
            request_id=request_output.request_id,
            finished=request_output.finished,
            stage_id=stage_id,
            final_output_type=final_output_type,
            request_output=request_output,
            prompt=request_output.prompt,
        )

    @property
    def is_diffusion_output(self) -> bool:
        """Whether a diffusion stage made it."""
        return isinstance(self.request_output, list)

    @property
    def is_pipeline_output(self) -> bool:
        """Whether an autoregressive stage made it."""
        return not self.is_diffusion_output and self.request_output is not None

    @property
    def num_images(self) -> int:
        """Number of pictures."""
        return len(self.images)

    @property
    def outputs(self) -> list[Any]:
        """Diffusion: the pictures. Autoregressive: vLLM's ``CompletionOutput``s."""
        if self.is_diffusion_output or self.request_output is None:
            return self.images
        return self._vllm().outputs

    @property
    def prompt_token_ids(self) -> list[int] | None:
        """Token ids of the prompt (autoregressive stages)."""
        return self._vllm().prompt_token_ids if self.is_pipeline_output else None

    @property
    def prompt_logprobs(self) -> Any:
        """Log probabilities of the prompt (autoregressive stages)."""
        return self._vllm().prompt_logprobs if self.is_pipeline_output else None

    @property
    def num_cached_tokens(self) -> int | None:
        """Prompt tokens that the prefix cache gave (autoregressive stages)."""
        return self._vllm().num_cached_tokens if self.is_pipeline_output else None

    @property
    def encoder_prompt_token_ids(self) -> list[int] | None:
        """Token ids of the encoder's prompt (autoregressive stages of encoder-decoder models)."""
        return self._vllm().encoder_prompt_token_ids if self.is_pipeline_output else None

    @property
    def kv_transfer_params(self) -> dict[str, Any] | None:
        """What another engine needs to take over the KV cache (autoregressive stages)."""
        return self._vllm().kv_transfer_params if self.is_pipeline_output else None

    def _vllm(self) -> RequestOutput:
        assert self.request_output is not None
        assert not isinstance(self.request_output, list)
        return self.request_output

    def to_dict(self) -> dict[str, Any]:
        """Plain values for logs and JSON: counts and sizes in place of media."""
        return {
            "request_id": self.request_id,
            "finished": self.finished,
            "stage_id": self.stage_id,
            "final_output_type": self.final_output_type,
            "num_images": self.num_images,
            "prompt": self.prompt,
            "metrics": self.metrics,
        }
