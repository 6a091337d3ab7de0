"""The custom pipeline of the guide (docs: custom pipelines), on the text-to-image model."""

import torch

from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.models.flux.pipeline_flux import FluxPipeline
from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image import QwenImagePipeline


class CustomPipeline(QwenImagePipeline):
    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)

    def forward(self, req, prompt=None, negative_prompt=None, **kwargs) -> DiffusionOutput:
        # Call parent's forward to get normal output
        output = super().forward(req=req, prompt=prompt, negative_prompt=negative_prompt, **kwargs)

        # Add custom trajectory data
        actual_num_steps = req.sampling_params.num_inference_steps or kwargs.get("num_inference_steps", 50)
        output.trajectory_timesteps = torch.linspace(1000, 0, actual_num_steps, dtype=torch.float32)
        output.trajectory_latents = torch.randn(actual_num_steps, 1, 16, 64, 64, dtype=torch.float32)

        return output


class Inherited(QwenImagePipeline):
    """Changes a verb's input and not ``forward``: it still runs step by step."""

    def encode_prompts(self, texts, params):
        return super().encode_prompts([text + " at night" for text in texts], params)


class RunsOut(FluxPipeline):
    """Rank 1 runs out of memory in the middle of the transformer, in a batch that holds the prompt "boom"."""

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)
        self.doomed: int | None = None
        self.transformer.single_transformer_blocks[-1].register_forward_pre_hook(self.maybe_run_out)

    def encode_prompts(self, texts, params):
        self.doomed = params.seed if texts == ["boom"] else None
        return super().encode_prompts(texts, params)

    def maybe_run_out(self, block, args) -> None:
        if self.doomed is not None and parallel_state.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory (made up by the test)")
