"""A pipeline outside of the package that reads a picture and makes its negative."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image import QwenImagePipeline
from vllm_omni.diffusion.request import OmniDiffusionRequest


class InvertPipeline(QwenImagePipeline):
    support_image_input = True

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)

    def check(self, req: OmniDiffusionRequest) -> OmniDiffusionRequest:
        return replace(super().check(replace(req, prompts=req.texts())), prompts=req.prompts)

    def forward(self, req, prompt=None, negative_prompt=None, **kwargs) -> DiffusionOutput:
        (picture,) = req.media("image")
        several = picture if isinstance(picture, list) else [picture]
        pixels = np.stack([np.asarray(one, np.float32) for one in several]).mean(0)
        inverted = torch.from_numpy(1 - pixels / 127.5).permute(2, 0, 1)[None]
        return DiffusionOutput(inverted.repeat(req.sampling_params.num_outputs_per_prompt, 1, 1, 1))
