"""FLUX.1: text to image by rectified flow, guided by an embedded scale (dev) or distilled without one (schnell)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, T5EncoderModel

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.models.common.components import Component, build_encoder, build_vae, load_tokenizer
from vllm_omni.diffusion.models.common.guidance import plain_cfg
from vllm_omni.diffusion.models.common.images import postprocess_images
from vllm_omni.diffusion.models.common.pipeline import DiTPipeline
from vllm_omni.diffusion.models.common.state import Conditioning
from vllm_omni.diffusion.models.common.text_encoders import count_tokens, encode_clip_pooled, encode_t5
from vllm_omni.diffusion.models.flux.defaults import DEV, SCHNELL
from vllm_omni.diffusion.models.flux.flux_transformer import FluxTransformer2DModel
from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs
from vllm_omni.inputs.data import OmniDiffusionSamplingParams


class FluxPipeline(DiTPipeline):
    """FLUX.1-dev and -schnell; the checkpoint's ``guidance_embeds`` tells which."""

    components: ClassVar[tuple[Component, ...]] = (
        Component("text_encoder", renames=(("text_model.", ""), ("", "text_model."))),
        Component("text_encoder_2", renames=(("encoder.embed_tokens.", "shared."),)),
        Component("transformer"),
        Component("vae"),
    )

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)
        self.tokenizer = load_tokenizer(self.folder, "tokenizer", od_config)
        self.tokenizer_2 = load_tokenizer(self.folder, "tokenizer_2", od_config)
        self.text_encoder = build_encoder(CLIPTextModel, self.folder, "text_encoder")
        self.text_encoder_2 = build_encoder(T5EncoderModel, self.folder, "text_encoder_2")
        self.transformer = FluxTransformer2DModel(
            od_config=od_config, **get_transformer_config_kwargs(od_config.tf_model_config, FluxTransformer2DModel)
        )
        self.vae = build_vae(AutoencoderKL, self.folder, od_config)
        self.vae_scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.defaults = DEV if self.transformer.guidance_embeds else SCHNELL

    def encode_prompts(self, texts: Sequence[str], params: OmniDiffusionSamplingParams) -> Conditioning:
        """T5 states and pooled CLIP text."""
        assert params.max_sequence_length is not None
        return Conditioning(
            text_BTD=encode_t5(self.text_encoder_2, self.tokenizer_2, texts, params.max_sequence_length),
            pooled_BD=encode_clip_pooled(self.text_encoder, self.tokenizer, texts),
            counts=count_tokens(self.tokenizer_2, texts, params.max_sequence_length),
        )

    def combine(self, positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        """See ``DiTPipeline.combine``."""
        return plain_cfg(positive, negative, scale)

    def decode_latents(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """See ``DiTPipeline.decode_latents``."""
        config = self.vae.config
        out: torch.Tensor = self.vae.decode(
            latents_BCHW / config.scaling_factor + config.shift_factor, return_dict=False
        )[0]
        return out


def get_flux_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """What makes pictures of the pipeline's output."""
    return postprocess_images
