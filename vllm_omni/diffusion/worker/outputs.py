"""From what a pipeline returns to what a caller gets, without holding the device up.

Pictures become uint8 on the device, and the copy to the host is only started; ``PendingOutput.ready`` says when it has
arrived. Meanwhile the device goes on with the next denoise step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vllm_omni.diffusion.data import DiffusionOutput
from vllm_omni.diffusion.ipc import Output, Preview
from vllm_omni.diffusion.models.common.images import postprocess_images

PostProcess = Callable[[torch.Tensor], Any]


def to_uint8(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] as [B, H, W, C] uint8, on their device."""
    unit = postprocess_images(images_BCHW, "pt").permute(0, 2, 3, 1).float()
    return (unit * 255.0).round().to(torch.uint8).contiguous()


def to_unit(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] as float32 in [0, 1], on their device."""
    unit: torch.Tensor = postprocess_images(images_BCHW, "pt").float()
    return unit


def _to_pil(host_BHWC: torch.Tensor) -> list[Any]:
    return [Image.fromarray(picture) for picture in host_BHWC.numpy()]


def _to_numpy(host_BCHW: torch.Tensor) -> list[Any]:
    return list(host_BCHW.permute(0, 2, 3, 1).numpy())


def _to_tensors(host_BCHW: torch.Tensor) -> list[Any]:
    return list(host_BCHW)


# output_type -> (on the device, on the host); the same pictures as postprocess_images makes in one go.
_FORMS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], list[Any]]]] = {
    "pil": (to_uint8, _to_pil),
    "np": (to_unit, _to_numpy),
    "pt": (to_unit, _to_tensors),
}


def to_host(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Start a copy to (pinned) host memory; it has arrived when the device has come to this point."""
    if tensor is None or tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def start_images(
    out: DiffusionOutput, output_type: str, registered: PostProcess | None
) -> tuple[torch.Tensor | None, Callable[[torch.Tensor], list[Any]]]:
    """Begin to turn ``out.output`` into pictures.

    A post-processing function of the output itself goes before the model's registered one. Both are functions from the
    tensor to pictures, and wait for the device; only the package's own ``postprocess_images`` is done in two halves.

    Returns:
        A tensor on its way to the host, and what turns it into a list of pictures once it is there.
    """
    if out.output is None:
        return None, _to_tensors
    post_process = out.post_process_func or (registered if output_type == "pil" else None)
    if post_process is not None and post_process is not postprocess_images:
        made = list(post_process(out.output))
        return out.output.new_empty(0, device="cpu"), lambda _: made
    on_device, on_host = _FORMS[output_type]
    return to_host(on_device(out.output)), on_host


@dataclass
class PendingPreview:
    """A preview on its way to the host."""

    event: torch.cuda.Event | None
    request_id: str
    step: int
    images_BHWC: torch.Tensor
    size: tuple[int, int]

    @classmethod
    def start(
        cls, images_BCHW: torch.Tensor, request_id: str, step: int, height_width: tuple[int, int]
    ) -> PendingPreview:
        """Begin to bring pictures in [-1, 1] to the host."""
        host = to_host(to_uint8(images_BCHW))
        assert host is not None
        event = None
        if images_BCHW.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return cls(event, request_id, step, host, (height_width[1], height_width[0]))

    def ready(self) -> bool:
        """Whether it has arrived."""
        return self.event is None or bool(self.event.query())

    def preview(self) -> Preview:
        """The preview, once it is there."""
        return Preview(self.request_id, self.step, self.images_BHWC.numpy(), self.size)


@dataclass
class PendingOutput:
    """Output of one request, on its way to the host."""

    event: torch.cuda.Event | None
    """Set when every copy has arrived; None when there was nothing to wait for."""
    images: torch.Tensor | None
    finish_images: Callable[[torch.Tensor], list[Any]]
    latents: torch.Tensor | None
    metrics: dict[str, Any]
    extras: dict[str, Any]

    def ready(self, wait: bool) -> bool:
        """Whether ``output`` may be called; ``wait`` blocks until it may."""
        if self.event is None:
            return True
        if wait:
            self.event.synchronize()
        return bool(self.event.query())

    def output(self) -> Output:
        """The finished output."""
        images = [] if self.images is None else self.finish_images(self.images)
        return Output(images=images, latents=self.latents, metrics=self.metrics, extras=self.extras)
