"""The model's own small tokenizer, in the files that the released one has: byte-level BPE over the world's captions.

Every word of the captions and of the pipeline's prompt template becomes one token (so the template's fixed part is
34 tokens, as in the released vocabulary); the letters of drawn words and anything unknown fall back to bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from tools.default_model.world import WORDS, sample

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Special tokens, the last ids of the vocabulary."""

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""The prompt template of the Qwen-Image pipeline."""

PREFIX = 34
"""Tokens of the template before the caption; the pipeline drops their features."""

EXTRA_WORDS = (
    "the a an and of on in at to with is are color colour grey picture shows showing next beside rectangle plus sign "
    "left right top bottom center middle side corner one two three four five small medium large red green blue please"
)
"""Words that a newcomer may write; the model has not learnt all of them, but they shall not fall apart into bytes."""

SUFFIX = 5
"""Tokens of the template after the caption."""


def _corpus(seed: int, number: int) -> list[str]:
    rng = random.Random(seed)
    lines = [TEMPLATE.format("").replace("<|im_start|>", " ").replace("<|im_end|>", " ")] * 50
    lines += ["system", "user", "assistant", " word", "The word", " number", " digit"] * 50
    lines += [f" {word}" for word in EXTRA_WORDS.split()] * 50
    while len(lines) < number:
        text = sample(rng).caption
        if not any(word in text.split() or word + "." in text.split() for word in WORDS):
            lines.append(text)
    return lines


def build(folder: Path, seed: int = 0) -> Any:
    """Train a Qwen2Tokenizer and save it (vocab.json, merges.txt, tokenizer.json, tokenizer_config.json)."""
    # the data processes import this module too and shall not wait for transformers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(_corpus(seed, 40000), trainer)
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    merges = [tuple(pair) for pair in model["merges"]]
    for name in SPECIALS:
        vocab[name] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, additional_special_tokens=list(SPECIALS[1:]))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return tokenizer


class Encoder:
    """Turns captions into padded token rows, fast and without transformers (used by the data processes)."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.pad: int = self._tokenizer.get_vocab()[SPECIALS[0]]

    def __call__(self, captions: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (N, PREFIX + length), int64, and how many of each row are real, (N,), int64.

        Raises:
            ValueError: if a caption needs more than `length` tokens with the template's end.
        """
        ids = np.full((len(captions), PREFIX + length), self.pad, dtype=np.int64)
        counts = np.zeros(len(captions), dtype=np.int64)
        rows = self._tokenizer.encode_batch([TEMPLATE.format(text) for text in captions], add_special_tokens=False)
        for index, row in enumerate(rows):
            if len(row.ids) > ids.shape[1]:
                raise ValueError(
                    f"caption of {len(row.ids) - PREFIX} tokens, allowed are {length}: {captions[index]!r}"
                )
            ids[index, : len(row.ids)] = row.ids
            counts[index] = len(row.ids)
        return ids, counts


def main() -> None:
    """Build the tokenizer and print its size and the length of the template's prefix."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    tokenizer = build(parser.parse_args().folder)
    prefix = tokenizer(TEMPLATE.split("{}")[0]).input_ids
    print(f"vocabulary {len(tokenizer)}, template prefix {len(prefix)} tokens (must be {PREFIX})")
    if len(prefix) != PREFIX:
        raise SystemExit("the template's prefix has the wrong length")


if __name__ == "__main__":
    main()
