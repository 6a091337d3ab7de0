"""Tiny text models and their checkpoints, for tests of autoregressive stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from vllm_omni.model_executor.tiny_models.text import make_tokenizer

HIDDEN, LAYERS = 64, 3


def save_lm(folder: Path, kind: str = "qwen2", seed: int = 0, heads: tuple[int, int] = (2, 1)) -> Any:
    """Write a tiny random ``qwen2`` or ``qwen3`` language model with its tokenizer; returns it. ``heads`` are those of
    queries, and of keys and values."""
    tokenizer = make_tokenizer({})
    common: dict[str, Any] = {
        "vocab_size": (len(tokenizer) + 63) // 64 * 64,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    if kind == "qwen2":
        model: Any = Qwen2ForCausalLM(Qwen2Config(**common))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=32, **common))
    for parameter in model.parameters():  # the default spread of 0.02 makes every model nearly linear
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.float().eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
