"""FLUX.1."""

from vllm_omni.diffusion.models.flux.flux_transformer import FluxTransformer2DModel
from vllm_omni.diffusion.models.flux.pipeline_flux import FluxPipeline, get_flux_post_process_func

__all__ = ["FluxPipeline", "FluxTransformer2DModel", "get_flux_post_process_func"]
