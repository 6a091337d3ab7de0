"""From an answer's pieces and their times to what a user notices of it."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import wave
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vllm_omni.benchmarks.http_client import Answer
from vllm_omni.benchmarks.workload import Call

CHAT_RATE = 24_000
"""Samples a second of a chat's ``pcm16``."""
_WAV_HEAD = 44


class WrongAnswer(ValueError):
    """The server answered 200 with something else than what was asked for."""


class _Item(msgspec.Struct):
    """One picture; its data are not looked at."""


class _Pictures(msgspec.Struct):
    data: list[_Item]


class _Audio(msgspec.Struct):
    data: str = ""
    transcript: str = ""


class _Delta(msgspec.Struct):
    content: str | list[Any] | None = None
    audio: _Audio | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    modality: str | None = None
    """What ``content`` holds where a server puts sound there, as a file; see ``--compat upstream``."""
    error: dict[str, Any] | None = None


_PICTURES = msgspec.json.Decoder(_Pictures)
_CHUNK = msgspec.json.Decoder(_Chunk)


@dataclass(slots=True)
class Measured:
    """One request. Times are ``time.perf_counter()`` seconds; figures that it has not are None or empty."""

    label: str
    due: float = 0.0
    """When it should have been sent: the clock of its latency, also when the client was late."""
    sent: float = 0.0
    end: float = 0.0
    status: int = 0
    error: str | None = None
    """Kind of failure; None when all went well."""
    message: str = ""
    retries: int = 0
    retry_after: float | None = None
    """Seconds that a refusal (429) asked to wait."""
    images: int = 0
    prompt_tokens: int = 0
    text_tokens: int = 0
    texts: list[float] = field(default_factory=list)
    """When each piece of text came."""
    sounds: list[tuple[float, float]] = field(default_factory=list)
    """(when each piece of sound came, its seconds)."""

    @property
    def e2e(self) -> float:
        """Seconds from ``due`` to the end."""
        return self.end - self.due

    @property
    def ttft(self) -> float | None:
        """Seconds to the first text."""
        return self.texts[0] - self.due if self.texts else None

    @property
    def ttfp(self) -> float | None:
        """Seconds to the first sound."""
        return self.sounds[0][0] - self.due if self.sounds else None

    @property
    def tpot(self) -> float | None:
        """Mean seconds between two tokens of the text, after the first piece."""
        if len(self.texts) < 2 or self.text_tokens < 2:
            return None
        return (self.texts[-1] - self.texts[0]) / (self.text_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Seconds between neighbouring pieces of text."""
        return [after - before for before, after in zip(self.texts, self.texts[1:], strict=False)]

    @property
    def audio_seconds(self) -> float:
        """Length of the sound."""
        return sum(seconds for _, seconds in self.sounds)

    @property
    def rtf(self) -> float | None:
        """Time of the request over the length of its sound."""
        return self.e2e / self.audio_seconds if self.sounds and self.audio_seconds else None

    @property
    def underrun(self) -> float | None:
        """Seconds for which a player that starts with the first piece would have been silent before the last one."""
        if not self.sounds:
            return None
        starved, heard = 0.0, self.sounds[0][0]
        for arrived, seconds in self.sounds:
            starved += max(0.0, arrived - heard)
            heard = max(heard, arrived) + seconds
        return starved

    def meets(self, objectives: dict[str, float]) -> bool:
        """Whether it succeeded within all bounds; a figure that it does not have is not bounded."""
        if self.error is not None:
            return False
        values = {name: getattr(self, name) for name in objectives}
        return all(value is None or value <= objectives[name] for name, value in values.items())


def read_answer(call: Call, answer: Answer, out: Measured) -> None:
    """Fill ``out`` from a successful answer.

    Raises:
        WrongAnswer: there is no picture, sound or text in it, or it ends with an error.
    """
    try:
        {"image": _read_pictures, "speech": _read_wav, "chat": _read_chat}[call.kind](answer, out)
    except (msgspec.DecodeError, struct.error, binascii.Error, wave.Error, EOFError) as error:
        raise WrongAnswer(f"not the form of {call.path}: {error}") from error


def _read_pictures(answer: Answer, out: Measured) -> None:
    out.images = len(_PICTURES.decode(answer.body).data)
    if not out.images:
        raise WrongAnswer("no picture")


def _read_wav(answer: Answer, out: Measured) -> None:
    """Bare 16-bit mono sound behind a head that tells its rate."""
    head = b"".join(piece for _, piece in answer.pieces[:_WAV_HEAD])[:_WAV_HEAD]
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        raise WrongAnswer("no wav file")
    (rate,) = struct.unpack_from("<I", head, 24)
    left = _WAV_HEAD
    for arrived, piece in answer.pieces:
        skipped = min(left, len(piece))
        left -= skipped
        if len(piece) > skipped:
            out.sounds.append((arrived, (len(piece) - skipped) / 2 / rate))
    if not out.sounds:
        raise WrongAnswer("no sound")


def _file_seconds(data: bytes) -> float:
    """Length of a wav file in one piece."""
    with wave.open(io.BytesIO(data)) as file:
        return file.getnframes() / file.getframerate()


def events(answer: Answer) -> list[tuple[float, bytes]]:
    """(when it was complete, data) of each server-sent event."""
    found, rest = [], b""
    for arrived, piece in answer.pieces:
        *whole, rest = (rest + piece).split(b"\n\n")
        for event in whole:
            lines = [line[5:].lstrip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                found.append((arrived, b"\n".join(lines)))
    return found


def _read_chat(answer: Answer, out: Measured) -> None:
    ended = False
    for arrived, data in events(answer):
        if data == b"[DONE]":
            ended = True
            continue
        chunk = _CHUNK.decode(data)
        if chunk.error is not None:
            raise WrongAnswer(str(chunk.error.get("message", "an error in the stream")))
        if chunk.usage is not None:
            out.prompt_tokens, out.text_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        for choice in chunk.choices:
            audio = choice.delta.audio
            if chunk.modality == "audio" and isinstance(choice.delta.content, str):
                out.sounds.append((arrived, _file_seconds(base64.b64decode(choice.delta.content))))
            elif choice.delta.content or (audio is not None and audio.transcript):
                out.texts.append(arrived)
            if audio is not None and audio.data:
                out.sounds.append((arrived, len(base64.b64decode(audio.data)) / 2 / CHAT_RATE))
    if not ended:
        raise WrongAnswer("the stream was cut off")
