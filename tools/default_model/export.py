"""Writes the model in the released Qwen-Image layout: the folder that diffusers and this package load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from tools.default_model.models import TEXT, VISION, Layout

MODEL_INDEX = {
    "_class_name": "QwenImagePipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}

LARGEST_TOTAL = 20_000_000
"""Bytes that the whole folder may have."""


def _json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _weights(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().to(torch.bfloat16).contiguous().clone() for name, t in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def released_text_config(vocabulary: int, specials: dict[str, int]) -> dict[str, Any]:
    """The text encoder's config.json in the form of the released model (flat, with rope_scaling)."""
    text = {name: value for name, value in TEXT.items() if name != "mrope_section"}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": specials["<|endoftext|>"],
        "eos_token_id": specials["<|im_end|>"],
        "hidden_act": "silu",
        **text,
        "image_token_id": specials["<|image_pad|>"],
        "initializer_range": 0.02,
        "max_window_layers": TEXT["num_hidden_layers"],
        "rope_scaling": {"mrope_section": TEXT["mrope_section"], "rope_type": "default", "type": "default"},
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": specials["<|video_pad|>"],
        "vision_start_token_id": specials["<|vision_start|>"],
        "vision_end_token_id": specials["<|vision_end|>"],
        "vocab_size": vocabulary,
        "vision_config": {
            **VISION,
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            "in_chans": VISION["in_channels"],
            "out_hidden_size": TEXT["hidden_size"],
            "spatial_patch_size": VISION["patch_size"],
        },
    }


def _released_name(name: str) -> str | None:
    """Key on disk of a text encoder's parameter; None for the tied output layer."""
    if name.startswith("lm_head."):
        return None
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def export(
    folder: Path,
    layout: Layout,
    vae: AutoencoderKLQwenImage,
    transformer: QwenImageTransformer2DModel,
    text_encoder: Qwen2_5_VLForConditionalGeneration,
    tokenizer: Path,
    specials: dict[str, int],
    card: Path | None = None,
) -> int:
    """Write the checkpoint in bfloat16; returns its bytes.

    Raises:
        ValueError: if it is larger than LARGEST_TOTAL.
    """
    _json(folder / "model_index.json", MODEL_INDEX)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.42.1", **layout.scheduler}
    _json(folder / "scheduler" / "scheduler_config.json", scheduler)
    means = {name: [round(v, 4) for v in vae.config[name]] for name in ("latents_mean", "latents_std")}
    _json(folder / "vae" / "config.json", {"_class_name": "AutoencoderKLQwenImage", **layout.vae, **means})
    _weights(folder / "vae" / "diffusion_pytorch_model.safetensors", vae.state_dict())
    _json(folder / "transformer" / "config.json", {"_class_name": "QwenImageTransformer2DModel", **layout.transformer})
    _weights(folder / "transformer" / "diffusion_pytorch_model.safetensors", transformer.state_dict())
    vocabulary = text_encoder.get_input_embeddings().weight.shape[0]
    _json(folder / "text_encoder" / "config.json", released_text_config(vocabulary, specials))
    named = ((_released_name(name), tensor) for name, tensor in text_encoder.state_dict().items())
    _weights(folder / "text_encoder" / "model.safetensors", {name: t for name, t in named if name})
    if tokenizer.resolve() != (folder / "tokenizer").resolve():
        shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    if card is not None:
        shutil.copy(card, folder / "README.md")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST_TOTAL:
        raise ValueError(f"checkpoint of {size} bytes; allowed are {LARGEST_TOTAL}")
    return size
