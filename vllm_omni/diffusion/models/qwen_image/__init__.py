"""Qwen-Image."""

from typing import TYPE_CHECKING

from vllm_omni.lazy import lazy_names

if TYPE_CHECKING:
    from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image import (
        QwenImagePipeline,
        get_qwen_image_post_process_func,
    )
    from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import QwenImageTransformer2DModel

_LAZY = {
    "QwenImagePipeline": "vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image",
    "QwenImageTransformer2DModel": "vllm_omni.diffusion.models.qwen_image.qwen_image_transformer",
    "get_qwen_image_post_process_func": "vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image",
}

__all__ = ["QwenImagePipeline", "QwenImageTransformer2DModel", "get_qwen_image_post_process_func"]

__getattr__ = lazy_names(__name__, _LAZY)
