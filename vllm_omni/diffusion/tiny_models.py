"""Tiny random checkpoints in the layout of the released ones, for tests and for people who add models.

They are made by diffusers' and transformers' own classes, and every weight is random and none is zero: prompt, seed,
guidance, negative prompt and size each change the picture.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_omni.config.schema import nearest
from vllm_omni.diffusion import tiny_tokenizers
from vllm_omni.errors import ConfigError

Json = dict[str, Any]


@dataclass(frozen=True)
class TinyFamily:
    """One kind of tiny checkpoint."""

    pipeline: str
    """Pipeline class that runs it."""
    help: str
    """What it resembles."""
    build: Callable[[Path, int], None]
    """Writes it into a folder, from a seed."""


def make_tiny_model(family: str, folder: str | Path, *, seed: int = 0) -> Path:
    """Write a tiny random checkpoint of ``family`` into ``folder`` (made when missing) and return the folder.

    Raises:
        ConfigError: an unknown family.
    """
    if family not in FAMILIES:
        raise ConfigError(f"no tiny model {family!r}{nearest(family, FAMILIES)}", field="family")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    FAMILIES[family].build(path, seed)
    return path


def _write(path: Path, data: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _randomise(module: nn.Module, seed: int) -> None:
    """Fill every parameter with noise of its own seed; matrices keep the size of activations, norms stay near one."""
    for name, param in module.named_parameters():
        generator = torch.Generator().manual_seed(seed * 1000003 + zlib.crc32(name.encode()))
        noise = torch.randn(param.shape, generator=generator)
        if param.dim() < 2:
            value = (1.0 if name.endswith(("weight", "gamma")) else 0.0) + 0.1 * noise
        elif "embed" in name or "shared" in name:
            value = noise
        elif name.endswith("gamma"):
            value = 1.0 + 0.1 * noise
        else:
            value = noise * param[0].numel() ** -0.5
        param.data.copy_(value)


def _save_transformers(cls: Any, folder: Path, config: Json, seed: int) -> None:
    """A transformers model whose config.json has the released form, which newer versions read but no longer write."""
    _write(folder / "config.json", config)
    model = cls(cls.config_class.from_pretrained(folder)).eval()
    _randomise(model, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    _write(folder / "config.json", config)


def _save_diffusers(cls: Any, folder: Path, config: Json, seed: int, shard: str = "10GB") -> None:
    model = cls.from_config(config).eval()
    _randomise(model, seed)
    model.save_pretrained(folder, max_shard_size=shard)
    _write(folder / "config.json", {"_class_name": cls.__name__, "_diffusers_version": "0.30.0.dev0", **config})


def _build_flux(folder: Path, seed: int, *, dev: bool) -> None:
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

    clip_vocab = tiny_tokenizers.write_clip(folder / "tokenizer")
    t5_vocab = tiny_tokenizers.write_t5(folder / "tokenizer_2")
    transformer = {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 32,
        "guidance_embeds": dev,
        "axes_dims_rope": [8, 12, 12],
    }
    _save_diffusers(FluxTransformer2DModel, folder / "transformer", transformer, seed, shard="2MB")
    _save_diffusers(AutoencoderKL, folder / "vae", _KL_VAE, seed + 1)
    _save_transformers(CLIPTextModel, folder / "text_encoder", {**_CLIP, "vocab_size": clip_vocab}, seed + 2)
    _save_transformers(T5EncoderModel, folder / "text_encoder_2", {**_T5, "vocab_size": t5_vocab}, seed + 3)
    scheduler = {"shift": 3.0, "use_dynamic_shifting": True} if dev else {"shift": 1.0, "use_dynamic_shifting": False}
    _write(folder / "scheduler" / "scheduler_config.json", {**_SCHEDULER, **scheduler})
    _write(
        folder / "model_index.json",
        {
            "_class_name": "FluxPipeline",
            "_diffusers_version": "0.30.0.dev0",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def _build_qwen_image(folder: Path, seed: int) -> None:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokens = tiny_tokenizers.write_qwen2(folder / "tokenizer")
    transformer = {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "guidance_embeds": False,
        "axes_dims_rope": [8, 12, 12],
    }
    _save_diffusers(QwenImageTransformer2DModel, folder / "transformer", transformer, seed, shard="2MB")
    _write(
        folder / "transformer" / "config.json",
        {
            "_class_name": "QwenImageTransformer2DModel",
            "_diffusers_version": "0.34.0.dev0",
            "pooled_projection_dim": 768,
            **transformer,
        },
    )
    _save_diffusers(AutoencoderKLQwenImage, folder / "vae", _QWEN_VAE, seed + 1)
    _save_transformers(Qwen2_5_VLForConditionalGeneration, folder / "text_encoder", {**_QWEN_VL, **tokens}, seed + 2)
    _write(
        folder / "scheduler" / "scheduler_config.json",
        {
            **_SCHEDULER,
            "max_image_seq_len": 8192,
            "max_shift": 0.9,
            "shift": 1.0,
            "shift_terminal": 0.02,
            "time_shift_type": "exponential",
            "use_dynamic_shifting": True,
            "invert_sigmas": False,
            "stochastic_sampling": False,
            "use_beta_sigmas": False,
            "use_exponential_sigmas": False,
            "use_karras_sigmas": False,
        },
    )
    _write(
        folder / "model_index.json",
        {
            "_class_name": "QwenImagePipeline",
            "_diffusers_version": "0.34.0.dev0",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "QwenImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLQwenImage"],
        },
    )


FAMILIES: dict[str, TinyFamily] = {
    "flux": TinyFamily("FluxPipeline", "FLUX.1-dev", lambda folder, seed: _build_flux(folder, seed, dev=True)),
    "flux-schnell": TinyFamily(
        "FluxPipeline", "FLUX.1-schnell", lambda folder, seed: _build_flux(folder, seed, dev=False)
    ),
    "qwen-image": TinyFamily("QwenImagePipeline", "Qwen-Image", _build_qwen_image),
}

_SCHEDULER: Json = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
}
_KL_VAE: Json = {
    "act_fn": "silu",
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 4,
    "sample_size": 64,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
_QWEN_VAE: Json = {
    "attn_scales": [],
    "base_dim": 8,
    "dim_mult": [1, 2, 2, 2],
    "dropout": 0.0,
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
    "latents_mean": [round(-0.8 + 0.1 * i, 4) for i in range(16)],
    "latents_std": [round(1.5 + 0.1 * i, 4) for i in range(16)],
}
_CLIP: Json = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "projection_dim": 32,
    "torch_dtype": "float32",
}
_T5: Json = {
    "architectures": ["T5EncoderModel"],
    "d_ff": 96,
    "d_kv": 12,
    "d_model": 48,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_QWEN_VL: Json = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "max_window_layers": 2,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 2,
        "fullatt_block_indexes": [1],
        "hidden_act": "silu",
        "hidden_size": 32,
        "in_channels": 3,
        "in_chans": 3,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "model_type": "qwen2_5_vl",
        "num_heads": 4,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
}
