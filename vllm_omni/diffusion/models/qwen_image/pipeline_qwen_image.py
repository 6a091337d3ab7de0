"""Qwen-Image: text to image by rectified flow with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage
from transformers import Qwen2_5_VLForConditionalGeneration

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.models.common.components import Component, build_encoder, build_vae, load_tokenizer
from vllm_omni.diffusion.models.common.guidance import norm_preserving_cfg
from vllm_omni.diffusion.models.common.images import postprocess_images
from vllm_omni.diffusion.models.common.pipeline import DiTPipeline
from vllm_omni.diffusion.models.common.state import Conditioning
from vllm_omni.diffusion.models.common.text_encoders import PromptTemplate, count_tokens, encode_causal_lm
from vllm_omni.diffusion.models.qwen_image.defaults import QWEN_IMAGE
from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import QwenImageTransformer2DModel
from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

TEMPLATE = PromptTemplate(
    text=(
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
        "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    drop=34,
    max_tokens=1024,
)


class QwenImagePipeline(DiTPipeline):
    """Qwen-Image and Qwen-Image-2512."""

    components: ClassVar[tuple[Component, ...]] = (
        Component("text_encoder", renames=(("model.", "model.language_model."), ("visual.", "model.visual."))),
        Component("transformer"),
        Component("vae"),
    )
    defaults = QWEN_IMAGE

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)
        self.tokenizer = load_tokenizer(self.folder, "tokenizer", od_config)
        self.text_encoder: Any = build_encoder(Qwen2_5_VLForConditionalGeneration, self.folder, "text_encoder")
        self.transformer = QwenImageTransformer2DModel(
            od_config=od_config, **get_transformer_config_kwargs(od_config.tf_model_config, QwenImageTransformer2DModel)
        )
        self.vae = build_vae(AutoencoderKLQwenImage, self.folder, od_config)
        self.vae_scale = 2 ** len(self.vae.config.temperal_downsample)
        statistics = torch.tensor([self.vae.config.latents_mean, self.vae.config.latents_std], device="cpu")
        self._mean, self._std = statistics.to(self.device, self.dtype)[:, None, :, None, None, None]

    def encode_prompts(self, texts: Sequence[str], params: OmniDiffusionSamplingParams) -> Conditioning:
        """States of the language model from the prompt on."""
        assert params.max_sequence_length is not None
        text_BTD, lengths = encode_causal_lm(
            self.text_encoder.model, self.tokenizer, texts, TEMPLATE, params.max_sequence_length
        )
        counts = count_tokens(self.tokenizer, texts, params.max_sequence_length)
        return Conditioning(text_BTD=text_BTD, text_lengths=lengths, counts=counts)

    def combine(self, positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        """See ``DiTPipeline.combine``."""
        return norm_preserving_cfg(positive, negative, scale)

    def decode_latents(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """See ``DiTPipeline.decode_latents``; the VAE is a video VAE given one frame."""
        latents_BCTHW = latents_BCHW.unsqueeze(2) * self._std + self._mean
        out: torch.Tensor = self.vae.decode(latents_BCTHW, return_dict=False)[0][:, :, 0]
        return out


def get_qwen_image_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """What makes pictures of the pipeline's output."""
    return postprocess_images
