"""A tiny random Qwen3-Omni checkpoint in the released layout.

The configuration has the form of the released ``config.json`` (``rope_theta`` and ``rope_scaling``, not the nested form
that transformers 5 writes); weights, tokenizer and processor are saved by transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_omni.model_executor.tiny_models.config import merged
from vllm_omni.model_executor.tiny_models.text import chat_template, make_tokenizer

_SPECIALS = {
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
    "audio_token": "<|audio_pad|>",
}
_PLAIN_SPECIALS = ("<tts_pad>", "<tts_text_bos>", "<tts_text_eod>")
_CODES = 128
"""Entries of a codebook. As in the release, the talker's last 1024 ids are control ids."""
_WAVE_GAIN = 0.002
_ROPE = {"rope_theta": 10000, "max_position_embeddings": 4096}
_MROPE = {"interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default", "type": "default"}


_FULL_TEXT = {"head_dim": 128, "num_experts": 128, "rope_theta": 1000000, "max_position_embeddings": 65536}
_FULL_SIZES: dict[str, Any] = {
    "torch_dtype": "bfloat16",
    "thinker_config": {
        "text_config": {
            **_FULL_TEXT,
            "vocab_size": 152064,
            "hidden_size": 2048,
            "intermediate_size": 768,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts_per_tok": 8,
            "rope_scaling": {"mrope_section": [24, 20, 20]},
        },
        "audio_config": {
            "d_model": 1280,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "downsample_hidden_size": 480,
            "output_dim": 2048,
        },
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
            "out_hidden_size": 2048,
            "image_size": 768,
        },
    },
    "talker_config": {
        "accept_hidden_layer": 24,
        "codec_pad_id": 2148,
        "codec_bos_id": 2149,
        "codec_eos_token_id": 2150,
        "codec_nothink_id": 2155,
        "codec_think_bos_id": 2156,
        "codec_think_eos_id": 2157,
        "thinker_hidden_size": 2048,
        "speaker_id": {"chelsie": 2301, "ethan": 2302, "aiden": 2303},
        "text_config": {
            **_FULL_TEXT,
            "vocab_size": 3072,
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "moe_intermediate_size": 384,
            "shared_expert_intermediate_size": 768,
            "num_hidden_layers": 20,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "num_experts_per_tok": 6,
            "rope_scaling": {"mrope_section": [24, 20, 20]},
        },
        "code_predictor_config": {
            "vocab_size": 2048,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 5,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_theta": 1000000,
            "max_position_embeddings": 32768,
        },
    },
    "code2wav_config": {
        "codebook_size": 2048,
        "codebook_dim": 512,
        "decoder_dim": 1536,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "sliding_window": 72,
    },
}


def make_tiny_qwen3_omni(folder: str | Path, seed: int = 0) -> Path:
    """Write the checkpoint (float32, about 8 MB) into ``folder`` and return it.

    Every part moves the result: weights are drawn at a scale that keeps activations near one, and the end-of-turn rows
    of both language-model heads are zero, so that greedy decoding never ends by itself (a stop token or a length does).
    """
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(_SPECIALS, _PLAIN_SPECIALS)
    config = released_config({token: int(index) for token, index in tokenizer.get_vocab().items()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3OmniMoeForConditionalGeneration(Qwen3OmniMoeConfig(**config)).eval()
        _draw(model)
    # The vocoder's residual stack amplifies: bring the waveform inside the final clamp.
    model.code2wav.decoder[-1].conv.weight.data.mul_(_WAVE_GAIN)
    with torch.no_grad():
        model.thinker.lm_head.weight[config["im_end_token_id"]].zero_()
        model.talker.codec_head.weight[config["talker_config"]["codec_eos_token_id"]].zero_()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _processor(tokenizer).save_pretrained(folder)
    return folder


def make_full_size_qwen3_omni(folder: str | Path) -> Path:
    """Write configuration, tokenizer and processor of the released sizes into ``folder``, without weights.

    For ``load_format: dummy``. The token ids are those of the tiny tokenizer; every shape is the release's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(_SPECIALS, _PLAIN_SPECIALS)
    config = full_size_config({token: int(index) for token, index in tokenizer.get_vocab().items()})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _processor(tokenizer).save_pretrained(folder)
    return folder


def full_size_config(ids: dict[str, int]) -> dict[str, Any]:
    """``released_config`` with the released sizes (Qwen3-Omni-30B-A3B-Instruct)."""
    return merged(released_config(ids), _FULL_SIZES)


def _draw(model: nn.Module) -> None:
    """Random values at a scale that keeps activations near one: a plain initialisation makes all outputs equal."""
    scales = {
        "q_norm.weight": 3.0,
        "layer_scale.scale": 0.5,
        "gamma": 0.5,
        "layernorm.weight": 1.0,
        "norm.weight": 1.0,
        "ln_q.weight": 1.0,
    }
    for name, parameter in model.named_parameters():
        centre = next((value for end, value in scales.items() if name.endswith(end)), 0.0)
        if parameter.dim() == 1:
            parameter.data.normal_(centre, 0.1)
        elif "embed" in name:
            parameter.data.normal_(0.0, 1.0)
        else:
            parameter.data.normal_(0.0, _fan_in(name, parameter) ** -0.5)


def _fan_in(name: str, weight: torch.Tensor) -> int:
    """Inputs that one output sums over. Expert tensors are [experts, out, in]; transposed convolutions [in, out, k]."""
    if "experts" in name:
        return weight.shape[-1]
    if "code2wav.decoder" in name and name.endswith("block.1.conv.weight"):
        return 2 * weight.shape[0]
    return weight[0].numel()


def released_config(ids: dict[str, int]) -> dict[str, Any]:
    """The released ``config.json`` in tiny sizes; ``ids`` gives the token ids of the tokenizer."""
    media = {
        "audio_token_id": ids["<|audio_pad|>"],
        "audio_start_token_id": ids["<|audio_start|>"],
        "audio_end_token_id": ids["<|audio_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "position_id_per_seconds": 13,
        "seconds_per_chunk": 2,
    }
    return {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "torch_dtype": "float32",
        "enable_audio_output": True,
        "im_start_token_id": ids["<|im_start|>"],
        "im_end_token_id": ids["<|im_end|>"],
        "system_token_id": ids["system"],
        "user_token_id": ids["user"],
        "assistant_token_id": ids["assistant"],
        "tts_pad_token_id": ids["<tts_pad>"],
        "tts_bos_token_id": ids["<tts_text_bos>"],
        "tts_eos_token_id": ids["<tts_text_eod>"],
        "thinker_config": _thinker(ids, media),
        "talker_config": _talker(media),
        "code2wav_config": {
            "codebook_size": _CODES,
            "codebook_dim": 32,
            "decoder_dim": 96,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_quantizers": 16,
            "sliding_window": 6,
            "upsample_rates": [8, 5, 4, 3],
            "upsampling_ratios": [2, 2],
            "rms_norm_eps": 1e-5,
            "layer_scale_initial_scale": 0.01,
            "max_position_embeddings": 8000,
            "rope_theta": 10000,
            "hidden_act": "silu",
        },
    }


def _thinker(ids: dict[str, int], media: dict[str, int]) -> dict[str, Any]:
    return {
        "model_type": "qwen3_omni_moe_thinker",
        **media,
        "vision_end_token_id": ids["<|vision_end|>"],
        "user_token_id": ids["user"],
        "text_config": {
            "model_type": "qwen3_omni_moe_text",
            "vocab_size": -(-len(ids) // 64) * 64,
            "hidden_size": 64,
            "intermediate_size": 32,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "shared_expert_intermediate_size": 0,
            "rms_norm_eps": 1e-6,
            **_ROPE,
            "rope_scaling": {**_MROPE, "mrope_interleaved": True},
            "tie_word_embeddings": False,
            "use_qk_norm": True,
        },
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "num_mel_bins": 128,
            "max_source_positions": 1500,
            "n_window": 50,
            "n_window_infer": 800,
            "conv_chunksize": 500,
            "downsample_hidden_size": 16,
            "output_dim": 64,
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            "out_hidden_size": 64,
            "hidden_act": "gelu_pytorch_tanh",
            "image_size": 64,
            "apply_vit_abs_pos_embed": True,
        },
    }


def _talker(media: dict[str, int]) -> dict[str, Any]:
    return {
        **{key: value for key, value in media.items() if key != "audio_end_token_id"},
        "audio_end_token_id": media["audio_end_token_id"],
        "accept_hidden_layer": 3,
        "codec_pad_id": _CODES + 100,
        "codec_bos_id": _CODES + 101,
        "codec_eos_token_id": _CODES + 102,
        "codec_nothink_id": _CODES + 107,
        "codec_think_bos_id": _CODES + 108,
        "codec_think_eos_id": _CODES + 109,
        "num_code_groups": 16,
        "thinker_hidden_size": 64,
        "spatial_merge_size": 2,
        "speaker_id": {"chelsie": _CODES + 253, "ethan": _CODES + 254, "aiden": _CODES + 255},
        "text_config": {
            "model_type": "qwen3_omni_moe_talker_text",
            "vocab_size": _CODES + 1024,
            "hidden_size": 64,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-6,
            **_ROPE,
            "rope_scaling": dict(_MROPE),
        },
        "code_predictor_config": {
            "vocab_size": _CODES,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_code_groups": 16,
            "rms_norm_eps": 1e-6,
            **_ROPE,
        },
    }


def _processor(tokenizer: Any) -> Any:
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3OmniMoeProcessor,
        WhisperFeatureExtractor,
    )

    media = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    return Qwen3OmniMoeProcessor(
        image_processor=Qwen2VLImageProcessor(**media, size=size),
        video_processor=Qwen2VLVideoProcessor(**media, size=size),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, sampling_rate=16000, padding_value=0.0),
        tokenizer=tokenizer,
        chat_template=chat_template(
            "<|vision_start|><|image_pad|><|vision_end|>",
            "<|vision_start|><|video_pad|><|vision_end|>",
            "<|audio_start|><|audio_pad|><|audio_end|>",
        ),
    )
