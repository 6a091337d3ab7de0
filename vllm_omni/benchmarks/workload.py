"""The requests of each workload, a pure function of its settings and the seed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from vllm_omni.benchmarks.args import BenchArgs
from vllm_omni.errors import ConfigError

Kind = Literal["image", "speech", "chat"]
PATHS: dict[Kind, str] = {
    "image": "/v1/images/generations",
    "speech": "/v1/audio/speech",
    "chat": "/v1/chat/completions",
}
PROMPT_WORDS = 40
"""Length of the prompts for pictures."""
MIXED: tuple[tuple[float, int, int], ...] = ((0.15, 512, 20), (0.25, 768, 20), (0.45, 1024, 25), (0.15, 1536, 35))
"""Weight, edge in pixels, steps."""
MIXED_SEED = 42
"""The order of the sizes is the same in every run, whatever ``seed`` says."""
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system"),
    *("program", "question", "work", "government", "number", "night", "point", "home", "water", "room", "mother"),
    *("area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business"),
)
"""Words that most tokenizers keep in one token."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request."""

    kind: Kind
    label: str
    """What it is compared with: requests of one label are alike."""
    body: dict[str, Any]

    @property
    def path(self) -> str:
        """Where it is sent."""
        return PATHS[self.kind]

    def encoded(self) -> bytes:
        """The JSON."""
        return msgspec.json.encode(self.body)


@dataclass(frozen=True)
class Target:
    """What the server serves."""

    model: str
    makes: frozenset[str] | None
    """Kinds of output; None when the server does not say."""
    stages: int = 0
    """Number of stages; 0 when the server does not say."""
    version: str | None = None
    """Of the server's package."""
    max_pixels: int | None = None
    """Of a picture that it makes, at most; None when the server does not say."""


def calls(args: BenchArgs, target: Target) -> Iterator[Call]:
    """The requests of ``args.workload``, without end; the n-th is the same in every run.

    Raises:
        ConfigError: the served model does not make what the workload asks for, or not so large.
    """
    chooser = {"small": _small, "t2i": _t2i, "mixed": _mixed, "tts": _tts, "omni": _omni}[args.workload]
    return chooser(args, target, random.Random(args.seed))


def _need(args: BenchArgs, target: Target, kind: str) -> None:
    if target.makes is not None and kind not in target.makes:
        made = " and ".join(sorted(target.makes))
        raise ConfigError(f"workload={args.workload!r} asks for {kind}; {target.model} makes {made}", field="workload")


def _fits(target: Target, size: str, field: str) -> None:
    width, height = map(int, size.split("x"))
    if target.max_pixels is not None and width * height > target.max_pixels:
        raise ConfigError(
            f"{field}: {size} has {width * height} pixels; {target.model} makes {target.max_pixels} at most",
            field=field,
        )


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def _picture(target: Target, label: str, prompt: str, seed: int, **more: Any) -> Call:
    given = {key: value for key, value in more.items() if value is not None}
    return Call("image", label, {"model": target.model, "prompt": prompt, "seed": seed, **given})


def parse_shape(text: str) -> tuple[str, int]:
    """``1024x1024/50`` as size and steps. Raises ``ConfigError``."""
    match = re.fullmatch(r"([1-9]\d*x[1-9]\d*)/([1-9]\d*)", text)
    if match is None:
        raise ConfigError(f"shape={text!r}: expected WIDTHxHEIGHT/STEPS, such as 1024x1024/50", field="shape")
    return match[1], int(match[2])


def _small(args: BenchArgs, target: Target, rng: random.Random) -> Iterator[Call]:
    if target.makes is None or "image" in target.makes:
        return _small_pictures(args, target, rng)
    if "audio" in target.makes:
        return _tts(args, target, rng)
    if "text" not in target.makes:
        made = " and ".join(sorted(target.makes))
        raise ConfigError(
            f"workload: there is none for models that make {made}, as {target.model} does", field="workload"
        )
    return _chats(target, rng, words=20, output={"max_tokens": 32}, speaks=False)


def _small_pictures(args: BenchArgs, target: Target, rng: random.Random) -> Iterator[Call]:
    """Sentences that the model of the package draws; every other model, too."""
    while True:
        colours, shapes = rng.choices(COLOURS, k=2), rng.choices(SHAPES, k=2)
        prompt = f"a {colours[0]} {shapes[0]} above a {colours[1]} {shapes[1]}"
        yield _picture(target, "default", prompt, rng.getrandbits(31), true_cfg_scale=args.true_cfg_scale)


def _t2i(args: BenchArgs, target: Target, rng: random.Random) -> Iterator[Call]:
    _need(args, target, "image")
    text = args.shape or "1024x1024/50"
    size, steps = parse_shape(text)
    _fits(target, size, "shape")
    return _pictures(args, target, rng, iter(lambda: (text, size, steps), None))


def _mixed(args: BenchArgs, target: Target, rng: random.Random) -> Iterator[Call]:
    _need(args, target, "image")
    largest = max(edge for _, edge, _ in MIXED)
    _fits(target, f"{largest}x{largest}", "workload")

    def shapes() -> Iterator[tuple[str, str, int]]:
        order = random.Random(MIXED_SEED)
        while True:
            _, edge, steps = order.choices(MIXED, [weight for weight, _, _ in MIXED])[0]
            yield f"{edge}x{edge}/{steps}", f"{edge}x{edge}", steps

    return _pictures(args, target, rng, shapes())


def _pictures(
    args: BenchArgs, target: Target, rng: random.Random, shapes: Iterator[tuple[str, str, int]]
) -> Iterator[Call]:
    scale = 4.0 if args.true_cfg_scale is None else args.true_cfg_scale
    for label, size, steps in shapes:
        prompt, seed = _text(rng, PROMPT_WORDS), rng.getrandbits(31)
        more = {"size": size, "num_inference_steps": steps, "true_cfg_scale": scale, "negative_prompt": " "}
        yield _picture(target, label, prompt, seed, **more)


def _tts(args: BenchArgs, target: Target, rng: random.Random) -> Iterator[Call]:
    _need(args, target, "audio")
    return _speech(args, target, rng)


def _speech(args: BenchArgs, target: Target, rng: random.Random) -> Iterator[Call]:
    words = args.input_tokens or 40
    more = {} if args.output_tokens is None else {"max_new_tokens": args.output_tokens}
    while True:
        text, seed = _text(rng, words), rng.getrandbits(31)
        body = {"model": target.model, "input": text, "seed": seed, "response_format": "wav", "stream": True}
        yield Call("speech", f"{words} words", {**body, **more})


def _omni(args: BenchArgs, target: Target, rng: random.Random) -> Iterator[Call]:
    _need(args, target, "text")
    words, tokens = args.input_tokens or 100, args.output_tokens or 100
    speaks = target.makes is not None and "audio" in target.makes
    output: dict[str, Any] = {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True}
    ratio = 3.6 if args.frames_per_token is None else args.frames_per_token
    if speaks and ratio and target.stages > 1:
        frames = max(1, round(tokens * ratio))
        rows: list[dict[str, Any]] = [{} for _ in range(target.stages)]
        rows[1] = {"max_tokens": frames, "min_tokens": frames, "ignore_eos": True}
        output["sampling_params_list"] = rows
    return _chats(target, rng, words, output, speaks)


def _chats(target: Target, rng: random.Random, words: int, output: dict[str, Any], speaks: bool) -> Iterator[Call]:
    spoken = {"modalities": ["text", "audio"], "audio": {"format": "pcm16"}} if speaks else {}
    while True:
        body = {
            "model": target.model,
            "messages": [{"role": "user", "content": _text(rng, words)}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "seed": rng.getrandbits(31),
        }
        yield Call("chat", f"{words} words", {**body, **output, **spoken})
