"""FLUX.1."""

from typing import TYPE_CHECKING

from vllm_omni.lazy import lazy_names

if TYPE_CHECKING:
    from vllm_omni.diffusion.models.flux.flux_transformer import FluxTransformer2DModel
    from vllm_omni.diffusion.models.flux.pipeline_flux import FluxPipeline, get_flux_post_process_func

_LAZY = {
    "FluxPipeline": "vllm_omni.diffusion.models.flux.pipeline_flux",
    "FluxTransformer2DModel": "vllm_omni.diffusion.models.flux.flux_transformer",
    "get_flux_post_process_func": "vllm_omni.diffusion.models.flux.pipeline_flux",
}

__all__ = ["FluxPipeline", "FluxTransformer2DModel", "get_flux_post_process_func"]

__getattr__ = lazy_names(__name__, _LAZY)
