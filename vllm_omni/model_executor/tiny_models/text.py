"""Tokenizer and chat template of the tiny omni checkpoints: Qwen's byte-level BPE, trained on a few sentences."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

_CORPUS = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nsay it again<|im_end|>\n",
    "<|im_start|>assistant\nYou are Qwen, a virtual human developed by the Qwen Team, Alibaba Group.<|im_end|>\n",
    "describe what you see and what you hear in the picture, the sound and the video",
)
_WHOLE_WORDS = ("system", "user", "assistant")
_TEXT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% elif c['type'] in ('image', 'image_url') %}%(image)s"
    "{% elif c['type'] in ('video', 'video_url') %}%(video)s"
    "{% elif c['type'] in ('audio', 'audio_url', 'input_audio') %}%(audio)s"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_template(image: str, video: str, audio: str) -> str:
    """Jinja template of Qwen's chat form; the arguments are what stands for one medium in the text."""
    return CHAT_TEMPLATE.replace("%(image)s", image).replace("%(video)s", video).replace("%(audio)s", audio)


def make_tokenizer(specials: Mapping[str, str], plain_specials: tuple[str, ...] = ()) -> Any:
    """A small tokenizer in which every role name and a newline are one token each.

    Args:
        specials: attribute of the tokenizer -> special token, as the model's processor reads them.
        plain_specials: special tokens without an attribute.

    Returns:
        A ``Qwen2Tokenizer``; ``<|im_end|>`` ends a turn, ``<|endoftext|>`` pads.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    vocab, merges = dict(model["vocab"]), [tuple(pair) for pair in model["merges"]]
    for word in _WHOLE_WORDS:
        _add_word(word, vocab, merges)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=dict(specials),
    )
    tokenizer.add_tokens([*_TEXT_SPECIALS, *plain_specials], special_tokens=True)
    for word in (*_WHOLE_WORDS, "\n"):
        if len(tokenizer.encode(word)) != 1:
            raise AssertionError(f"{word!r} must be one token of the tiny tokenizer")
    return tokenizer


def _add_word(word: str, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Append the merges that make ``word`` one token, starting from what the merges so far make of it."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    parts = list(word)
    while len(parts) > 1:
        pairs = list(itertools.pairwise(parts))
        at = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(merges)))
        if pairs[at] not in ranks:
            at = 0
            ranks[pairs[0]] = len(merges)
            merges.append(pairs[0])
            vocab.setdefault(parts[0] + parts[1], len(vocab))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
