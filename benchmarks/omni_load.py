"""Load on a speaking model: closed loops of requests with fixed lengths, and what is heard when."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

SAMPLE_RATE = 24000


@dataclass(frozen=True)
class Shape:
    """Lengths of a request."""

    prompt: int
    """Tokens of the prompt."""
    text: int
    """Tokens of the answer."""
    frames: int
    """Codec frames of the speech; 0 for text alone."""

    @classmethod
    def parse(cls, text: str) -> tuple[Shape, list[int]]:
        """``prompt/text/frames``, and after an ``@`` the numbers of clients that differ from the others'."""
        lengths, _, clients = text.partition("@")
        return cls(*map(int, lengths.split("/"))), [int(count) for count in clients.split(",") if count]

    @property
    def name(self) -> str:
        """Key in the results."""
        return f"{self.prompt}/{self.text}" + (f"/{self.frames}" if self.frames else " text only")


@dataclass
class Heard:
    """When what came of one request; seconds since it was sent."""

    text_at: list[float] = field(default_factory=list)
    """One entry a token."""
    audio_at: list[tuple[float, int]] = field(default_factory=list)
    """(time, samples) of each piece of sound."""
    end: float = 0.0
    stages: dict[Any, Any] = field(default_factory=dict)
    """What each stage had done when the first piece of sound came (``metrics["stages"]``)."""

    @property
    def audio_s(self) -> float:
        """Seconds of speech."""
        return sum(samples for _, samples in self.audio_at) / SAMPLE_RATE

    @property
    def tpot(self) -> float:
        """Seconds a token after the first."""
        return (self.text_at[-1] - self.text_at[0]) / max(1, len(self.text_at) - 1)

    @property
    def silence(self) -> float:
        """Seconds that a listener who starts with the first piece waits for later ones."""
        waited, played = 0.0, self.audio_at[0][0]
        for at, samples in self.audio_at:
            waited, played = waited + max(0.0, at - played), max(at, played) + samples / SAMPLE_RATE
        return waited


async def closed_loop(ask: Callable[[int], Awaitable[Heard]], requests: int, clients: int) -> tuple[list[Heard], float]:
    """``clients`` loops over ``requests`` numbered requests; what each heard, and the seconds of all."""
    numbers = iter(range(requests))
    heard: list[Heard] = []

    async def client() -> None:
        for number in numbers:
            heard.append(await ask(number))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return heard, time.perf_counter() - began


def figures(heard: list[Heard], wall: float) -> dict[str, Any]:
    """The numbers of one cell: medians, and the 95th percentile of what a user waits for."""
    out: dict[str, Any] = {
        "requests": len(heard),
        "wall_s": round(wall, 3),
        "req_s": round(len(heard) / wall, 3),
        "job_s": round(statistics.median(item.end for item in heard), 3),
        "ttft_ms": milliseconds([item.text_at[0] for item in heard]),
        "ttft_p95_ms": milliseconds([item.text_at[0] for item in heard], 0.95),
        "tpot_ms": milliseconds([item.tpot for item in heard]),
        "text_tokens": len(heard[0].text_at),
    }
    speaking = [item for item in heard if item.audio_at]
    if speaking:
        first = [item.audio_at[0][0] for item in speaking]
        out |= {
            "ttfp_ms": milliseconds(first),
            "ttfp_p95_ms": milliseconds(first, 0.95),
            "rtf": round(statistics.median(item.end / item.audio_s for item in speaking), 4),
            "audio_s": round(statistics.median(item.audio_s for item in speaking), 3),
            "audio_s_per_s": round(sum(item.audio_s for item in speaking) / wall, 2),
            "silence_ms": round(1000 * max(item.silence for item in speaking), 1),
            "pieces": len(speaking[0].audio_at),
            "stages_at_first_sound": speaking[-1].stages,
        }
    return out


def milliseconds(values: list[float], quantile: float = 0.5) -> float:
    """A quantile of seconds, in milliseconds."""
    ordered = sorted(values)
    value = (
        statistics.median(ordered) if quantile == 0.5 else ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]
    )
    return round(1000 * value, 2)


def prompt_ids(config: Any, length: int, seed: int) -> list[int]:
    """A prompt of ``length`` random tokens between the headers of a question and of an answer."""
    ids, rng = config["ids"], random.Random(seed)
    head = [ids["<|im_start|>"], ids["user"], ids["newline"]]
    tail = [ids["<|im_end|>"], ids["newline"], ids["<|im_start|>"], ids["assistant"], ids["newline"]]
    words = [rng.randrange(20, config["plain"]) for _ in range(length - len(head) - len(tail))]
    return [*head, *words, *tail]
