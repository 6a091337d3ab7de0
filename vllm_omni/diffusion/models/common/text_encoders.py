"""Text to conditioning: the kinds of text encoders that diffusion models use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


def count_tokens(tokenizer: Any, texts: Sequence[str], most: int) -> tuple[int, ...]:
    """Tokens of each text as ``tokenizer`` makes them, at most the ``most`` that the model reads; no template's."""
    return tuple(min(len(tokenizer(text).input_ids), most) for text in texts)


def encode_t5(encoder: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> torch.Tensor:
    """Last states of a T5 encoder, [B, max_length, D]; texts are cut or padded to ``max_length``, padding counts."""
    tokens = tokenizer(
        list(texts), padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
    ).input_ids
    out: torch.Tensor = encoder(tokens.to(encoder.device)).last_hidden_state
    return out


def encode_clip_pooled(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Pooled state of a CLIP text encoder, [B, D]; texts are cut or padded to the tokenizer's length."""
    tokens = tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    out: torch.Tensor = encoder(tokens.to(encoder.device)).pooler_output
    return out


@dataclass(frozen=True)
class PromptTemplate:
    """Text around a prompt for a chat model, of which the states before the prompt are dropped."""

    text: str
    """The template; ``{}`` is where the prompt goes."""
    drop: int
    """Tokens of the template before the prompt."""
    max_tokens: int
    """Tokens kept from the prompt on."""


def encode_causal_lm(
    decoder: Any, tokenizer: Any, texts: Sequence[str], template: PromptTemplate, max_length: int
) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """Last states of a language model from the prompt on, [B, T, D], and how many count of each (None: all).

    Each text runs by itself: no padding, no mask, the same states however many there are.
    """
    states = []
    for text in texts:
        tokens = tokenizer(
            template.text.replace("{}", text, 1),
            max_length=template.max_tokens + template.drop,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        hidden_1TD = decoder(input_ids=tokens.to(decoder.device), use_cache=False).last_hidden_state
        states.append(hidden_1TD[0, template.drop :][:max_length])
    lengths = tuple(len(state) for state in states)
    padded_BTD = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    return padded_BTD, None if len(set(lengths)) == 1 else lengths
