"""A Qwen2.5-Omni checkpoint small enough for tests: random weights in the released layout.

``make_tiny_qwen2_5_omni`` writes what ``Qwen/Qwen2.5-Omni-7B`` has in its folder: sharded safetensors with the names of
the release, ``config.json`` in the released form, generation defaults, tokenizer, processor with a chat template, and
``spk_dict.pt`` with the voices. Everything is saved by transformers, so its own classes load it too.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from vllm_omni.model_executor.tiny_models.config import merged
from vllm_omni.model_executor.tiny_models.text import chat_template, make_tokenizer

VOICES = ("Chelsie", "Ethan")
"""Names of the voices of the release."""
HIDDEN = 64
VOCAB = 512
CODEC_VOCAB = 8448
_MARKERS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
_SPEECH_MARKERS = ("<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>")
_TEMPLATE = chat_template(
    image="<|vision_bos|><|IMAGE|><|vision_eos|>",
    video="<|vision_bos|><|VIDEO|><|vision_eos|>",
    audio="<|audio_bos|><|AUDIO|><|audio_eos|>",
)


@functools.cache
def _tokenizer() -> Any:
    tokenizer = make_tokenizer(_MARKERS, _SPEECH_MARKERS)
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def special_id(token: str) -> int:
    """Id of special token ``token`` in the tiny vocabulary."""
    return int(_tokenizer().get_vocab()[token])


def _processor() -> Qwen2_5OmniProcessor:
    """Image, video and audio processors of the release, with small picture sizes."""
    pixels = {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28}
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        video_processor=Qwen2VLVideoProcessor(**pixels),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, sampling_rate=16000, chunk_length=30),
        tokenizer=_tokenizer(),
        chat_template=_TEMPLATE,
    )


def _rope(sections: list[int]) -> dict[str, Any]:
    return {
        "rope_theta": 1000000.0,
        "rope_scaling": {"mrope_section": sections, "rope_type": "default", "type": "default"},
    }


def _marker_ids() -> dict[str, int]:
    return {
        "audio_token_index": special_id("<|AUDIO|>"),
        "image_token_index": special_id("<|IMAGE|>"),
        "video_token_index": special_id("<|VIDEO|>"),
        "audio_start_token_id": special_id("<|audio_bos|>"),
        "audio_end_token_id": special_id("<|audio_eos|>"),
        "vision_start_token_id": special_id("<|vision_bos|>"),
        "vision_end_token_id": special_id("<|vision_eos|>"),
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
    }


def _thinker_config() -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_omni_thinker",
        "user_token_id": special_id("user"),
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "num_mel_bins": 128,
            "max_source_positions": 1500,
            "n_window": 100,
            "output_dim": HIDDEN,
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "out_hidden_size": HIDDEN,
        },
        "text_config": {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-06,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            **_rope([4, 6, 6]),
        },
        **_marker_ids(),
    }


def _talker_config() -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_omni_talker",
        "vocab_size": CODEC_VOCAB,
        "embedding_size": HIDDEN,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rms_norm_eps": 1e-06,
        "tts_codec_start_token_id": 8293,
        "tts_codec_end_token_id": 8294,
        "tts_codec_pad_token_id": 8292,
        "tts_codec_mask_token_id": 8296,
        "tts_text_start_token_id": special_id("<tts_text_bos>"),
        "tts_text_end_token_id": special_id("<tts_text_eod>"),
        "tts_text_pad_token_id": special_id("<tts_pad>"),
        "spatial_merge_size": 2,
        **_marker_ids(),
        **_rope([4, 6, 6]),
    }


def _token2wav_config() -> dict[str, Any]:
    dit = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "head_dim": 32,
        "ff_mult": 2,
        "emb_dim": 32,
        "block_size": 24,
        "look_ahead_layers": [2],
        "look_backward_layers": [0, 3],
        "repeats": 2,
        "num_embeds": 8193,
        "mel_dim": 80,
        "dropout": 0.1,
        "enc_emb_dim": 24,
        "enc_dim": 16,
        "enc_channels": [32, 32, 32, 32, 96],
        "enc_kernel_sizes": [5, 3, 3, 3, 1],
        "enc_dilations": [1, 2, 3, 4, 1],
        "enc_attention_channels": 16,
        "enc_res2net_scale": 2,
        "enc_se_channels": 16,
    }
    bigvgan = {
        "mel_dim": 80,
        "upsample_initial_channel": 64,
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        "upsample_rates": [5, 3, 2, 2, 2, 2],
        "upsample_kernel_sizes": [11, 7, 4, 4, 4, 4],
    }
    return {"model_type": "qwen2_5_omni_token2wav", "dit_config": dit, "bigvgan_config": bigvgan}


def tiny_config() -> dict[str, Any]:
    """``config.json`` of the tiny checkpoint, in the released form."""
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": True,
        "torch_dtype": "float32",
        "thinker_config": _thinker_config(),
        "talker_config": _talker_config(),
        "token2wav_config": _token2wav_config(),
    }


_FULL_SIZES: dict[str, Any] = {
    "torch_dtype": "bfloat16",
    "thinker_config": {
        "audio_config": {
            "d_model": 1280,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "output_dim": 3584,
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": 3584,
        },
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            **_rope([16, 24, 24]),
        },
    },
    "talker_config": {
        "embedding_size": 3584,
        "hidden_size": 896,
        "intermediate_size": 18944,
        "num_hidden_layers": 24,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 128,
        **_rope([16, 24, 24]),
    },
    "token2wav_config": {
        "dit_config": {
            "hidden_size": 1024,
            "num_hidden_layers": 22,
            "num_attention_heads": 16,
            "head_dim": 64,
            "emb_dim": 512,
            "look_ahead_layers": [10],
            "look_backward_layers": [0, 20],
            "enc_emb_dim": 192,
            "enc_dim": 128,
            "enc_channels": [256, 256, 256, 256, 768],
            "enc_attention_channels": 64,
            "enc_se_channels": 64,
        },
        "bigvgan_config": {"upsample_initial_channel": 1536},
    },
}
"""Where Qwen2.5-Omni-7B differs from ``tiny_config``."""


def full_size_config() -> dict[str, Any]:
    """``config.json`` with the sizes of Qwen2.5-Omni-7B; the token ids are those of the tiny tokenizer."""
    return merged(tiny_config(), _FULL_SIZES)


def make_full_size_qwen2_5_omni(folder: str | Path) -> Path:
    """Write configuration, tokenizer, processor and voices of the released sizes, without weights.

    For ``load_format: dummy``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = full_size_config()
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    _processor().save_pretrained(folder)
    make_voices(folder / "spk_dict.pt", _config(values))
    return folder


def _config(values: dict[str, Any]) -> Qwen2_5OmniConfig:
    return Qwen2_5OmniConfig(**{k: v for k, v in values.items() if k != "architectures"})


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Weights by fan-in, so that layers neither vanish nor saturate; norms near one."""
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        if "embed" in name and name.endswith(("embed_tokens.weight", "codec_embed.weight")):
            param.copy_(noise)
        elif param.dim() > 1:
            param.copy_(noise / math.sqrt(param[0].numel()))
        elif "norm" in name or "ln_" in name:
            param.copy_(1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise)
        else:
            param.copy_(0.1 * noise)


@torch.no_grad()
def _tame(model: Qwen2_5OmniForConditionalGeneration) -> None:
    """Keep ids that end or break a generation out of reach, and the sound inside [-1, 1]."""
    # No special token, so that generation runs to its token limit.
    model.thinker.lm_head.weight[list(_tokenizer().added_tokens_decoder)] = 0
    model.thinker.lm_head.weight[len(_tokenizer()) :] = 0
    codes = model.config.token2wav_config.dit_config.num_embeds + 1
    model.talker.codec_head.weight[codes:] = 0
    dit, vocoder = model.token2wav.code2wav_dit_model, model.token2wav.code2wav_bigvgan_model
    dit.proj_out.weight.mul_(0.5)
    vocoder.conv_post.weight.mul_(0.03)


def make_voices(path: Path, config: Qwen2_5OmniConfig, seed: int = 0) -> None:
    """Write a ``spk_dict.pt`` with random voices for ``config``, of any size (so also for full-size dummy weights)."""
    generator = torch.Generator().manual_seed(seed)
    dit, start = config.token2wav_config.dit_config, config.talker_config.tts_text_start_token_id
    voices = {
        name: {
            "bos_token": start + (0 if i == 0 else 2),
            "cond": torch.randn(1, dit.enc_emb_dim, generator=generator),
            "ref_mel": torch.randn(1, 60 + 17 * i, dit.mel_dim, generator=generator) - 4,
        }
        for i, name in enumerate(VOICES)
    }
    torch.save(voices, path)


def make_tiny_qwen2_5_omni(folder: str | Path, seed: int = 0) -> Path:
    """Write a tiny Qwen2.5-Omni checkpoint (fp32, 9 MB) into ``folder``; the same ``seed`` gives the same weights.

    Greedy decoding never reaches an end token (thinker: plain tokens only; talker: real codes only), so generations
    have the length that the test asks for.

    Returns:
        ``folder`` as a path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = tiny_config()
    config = _config(values)
    model = Qwen2_5OmniForConditionalGeneration(config).eval()
    _randomise(model, torch.Generator().manual_seed(seed))
    _tame(model)
    ends = [special_id("<|im_end|>"), special_id("<|endoftext|>")]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1], do_sample=False)
    model.save_pretrained(folder, max_shard_size="3MB")
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    _processor().save_pretrained(folder)
    make_voices(folder / "spk_dict.pt", config, seed)
    return folder
