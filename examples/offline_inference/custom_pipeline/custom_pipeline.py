"""A pipeline that also reports how the latents moved, step by step.

It runs inside the stage's process. Nothing of the package is changed for it: ``Omni`` gets the name of the class.
"""

from typing import Any

from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image import QwenImagePipeline
from vllm_omni.diffusion.request import OmniDiffusionRequest


class TrajectoryPipeline(QwenImagePipeline):
    """Qwen-Image that keeps the latents of every step, and the length of each step's move."""

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)

    def forward(
        self,
        req: OmniDiffusionRequest,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        **overrides: Any,
    ) -> DiffusionOutput:
        req.sampling_params.return_trajectory_latents = True
        output = super().forward(req=req, prompt=prompt, negative_prompt=negative_prompt, **overrides)
        moves = output.trajectory_latents.float().diff(dim=0).flatten(1).norm(dim=1)
        output.metrics["moves"] = [round(float(move), 3) for move in moves]
        return output
