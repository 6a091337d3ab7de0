"""The part of ``omni_speech.py`` that runs transformers' own ``generate``: one request at a time, the same lengths."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omni_load import Shape, prompt_ids
from omni_models import FAMILIES, vocabulary, write_model
from random_weights import fill


def build(name: str, folder: Path, device: str, dtype: torch.dtype) -> Any:
    """transformers' model of the folder's configuration with random weights, made on the device."""
    import transformers
    from transformers.initialization import no_init_weights

    values = json.loads((folder / "config.json").read_text())
    values.pop("architectures")
    cls, config_cls = {
        "qwen3": (transformers.Qwen3OmniMoeForConditionalGeneration, transformers.Qwen3OmniMoeConfig),
        "qwen2_5": (transformers.Qwen2_5OmniForConditionalGeneration, transformers.Qwen2_5OmniConfig),
    }[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            model = cls(config_cls(**values))
    finally:
        torch.set_default_dtype(before)
    model = model.eval().requires_grad_(False)
    fill(model)
    if name == "qwen2_5":
        model.token2wav.float()
        model.load_speakers(str(folder / "spk_dict.pt"))
    return model


def request(name: str, shape: Shape, config: Any) -> dict[str, Any]:
    """Arguments of ``generate`` for fixed lengths; the talker samples as its release says."""
    out: dict[str, Any] = {
        "thinker_max_new_tokens": shape.text,
        "thinker_min_new_tokens": shape.text,
        "thinker_do_sample": False,
        # Qwen3's predictor finds the other codes of a frame with the next token: one more gives the same frames.
        "talker_max_new_tokens": shape.frames + (name == "qwen3"),
        "talker_min_new_tokens": shape.frames + (name == "qwen3"),
    }
    if name == "qwen3":
        return out | {"speaker": "Ethan"}
    # Random weights say control ids, too, for which the vocoder has no embedding.
    talker, codes = config.talker_config, config.token2wav_config.dit_config.num_embeds
    return out | {
        "talker_bad_words_ids": [[i] for i in range(codes, talker.vocab_size) if i != talker.tts_codec_end_token_id]
    }


def main(args: argparse.Namespace, report: Callable[[str, Any], None]) -> None:
    """Build, warm up, measure every shape."""
    device = "cpu" if args.tiny else "cuda"
    folder = write_model(args.model, Path(tempfile.mkdtemp(prefix="omni-speech-")) / args.model, args.tiny)
    began = time.perf_counter()
    model = build(args.model, folder, device, torch.float32 if args.tiny else torch.bfloat16)
    report("start_s", round(time.perf_counter() - began, 1))
    words = vocabulary(folder)

    def speak(shape: Shape, seed: int) -> dict[str, Any]:
        ids = torch.tensor([prompt_ids(words, shape.prompt, seed)], device=device)
        torch.manual_seed(0)
        sent = time.perf_counter()
        mask = torch.ones_like(ids)
        sequences, wave = model.generate(input_ids=ids, attention_mask=mask, **request(args.model, shape, model.config))
        samples = wave.cpu().numel()
        job = time.perf_counter() - sent
        tokens = sequences.shape[1] - ids.shape[1]
        audio = samples / 24000
        found = {
            "job_s": round(job, 3),
            "text_tokens": tokens,
            "audio_s": round(audio, 3),
            "rtf": round(job / audio, 3),
        }
        return found | {"frames": round(audio * FAMILIES[args.model].frames_per_second, 1)}

    report("warm-up", speak(Shape(32, 4, 8), 0))
    for number, name in enumerate(args.reference_shapes):
        report(f"speech {name} c=1", speak(Shape.parse(name)[0], number + 1))
