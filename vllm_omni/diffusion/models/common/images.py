"""VAE output to pictures."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from vllm_omni.errors import RequestError


def postprocess_images(images_BCHW: torch.Tensor, output_type: str = "pil") -> Any:
    """Pictures in the form that was asked for, with the rounding of diffusers' ``VaeImageProcessor``.

    Args:
        images_BCHW: what the VAE gave, in [-1, 1]; for ``latent`` the latents.
        output_type: ``pil`` (a list of PIL images), ``np`` ([B, H, W, 3] float32 in [0, 1]), ``pt`` ([B, 3, H, W] in
            [0, 1]), ``latent`` (unchanged).

    Raises:
        RequestError: another ``output_type``.
    """
    if output_type == "latent":
        return images_BCHW
    unit_BCHW = (images_BCHW * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return unit_BCHW
    pixels_BHWC = unit_BCHW.permute(0, 2, 3, 1).float()
    if output_type == "np":
        return pixels_BHWC.cpu().numpy()
    if output_type != "pil":
        raise RequestError(f"output_type={output_type!r}: allowed are pil, np, pt, latent", field="output_type")
    # Rounded on the device: a quarter of the bytes to move.
    bytes_BHWC = (pixels_BHWC * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(picture) for picture in bytes_BHWC]
