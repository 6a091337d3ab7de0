"""Small tokenizers of the kinds that the released checkpoints have, trained on a few lines of text.

The text of the models' prompt templates is in the corpus, so that a template is as many tokens as in the real
vocabulary.
"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

_CORPUS = """A cup of coffee on the table, morning light, a photograph with great detail.
A small red fox sits in the snow; the sky is blue and the trees are dark.
Two cats play with a ball of yarn, oil painting, warm colors.
The old castle by the sea at night with a full moon over the waves.
A bowl of fruit: apples, pears, grapes and one green lemon.
blurry, low quality, bad hands, text, watermark
a dog runs through the green field while it rains
Portrait of a woman with a hat made of flowers, studio light.
"""
_QWEN_TEMPLATE = """system
Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects \
and background:
user
assistant
You are a helpful assistant.
"""
_QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _write_bpe(folder: Path, vocab: dict[str, int], merges: list[str], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _train_bpe(texts: list[str], pre_tokenizer: Any, size: int, **options: Any) -> tuple[dict[str, int], list[str]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=options.get("end_of_word_suffix", "")))
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=1, show_progress=False, initial_alphabet=alphabet, **options
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [" ".join(pair) for pair in model["merges"]]


def write_clip(folder: Path) -> int:
    """A CLIP tokenizer; returns the size of its vocabulary. The end token has the highest id, as in the real one."""
    from tokenizers import Regex, pre_tokenizers

    split = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "removed", invert=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    learned, merges = _train_bpe([_CORPUS.lower()] * 2, pre_tokenizer, 900, end_of_word_suffix="</w>")
    names = list(dict.fromkeys([*learned, *(f"{char}</w>" for char in learned if len(char) == 1)]))
    vocab = {name: i for i, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    config = {
        "add_prefix_space": False,
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    }
    _write_bpe(folder, vocab, merges, config)
    return len(vocab)


def write_t5(folder: Path) -> int:
    """A T5 tokenizer; returns the size of its vocabulary."""
    import sentencepiece
    from transformers import T5TokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS.splitlines() * 4),
        model_writer=model,
        model_type="unigram",
        vocab_size=218,
        hard_vocab_limit=False,
        byte_fallback=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {
        "eos_token": "</s>",
        "model_max_length": 512,
        "pad_token": "<pad>",
        "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tokenizer = T5TokenizerFast.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_qwen2(folder: Path) -> dict[str, int]:
    """A Qwen2 tokenizer with the tokens of Qwen2.5-VL; returns the ids that the model's config.json names."""
    from tokenizers import Regex, pre_tokenizers

    pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    vocab, merges = _train_bpe([_CORPUS, *([_QWEN_TEMPLATE] * 20)], pre_tokenizer, 640)
    ids = {name: len(vocab) + i for i, name in enumerate(_QWEN_SPECIALS)}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {
                "content": name,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for name, i in ids.items()
        },
        "additional_special_tokens": list(_QWEN_SPECIALS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write_bpe(folder, vocab, merges, config)
    (folder / "added_tokens.json").write_text(json.dumps(ids, indent=2), encoding="utf-8")
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "vocab_size": len(vocab) + len(ids),
    }
