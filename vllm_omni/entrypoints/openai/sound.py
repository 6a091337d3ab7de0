"""Sound files of a model's samples."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_omni.entrypoints.openai.media import optional
from vllm_omni.errors import StageError

Samples = npt.NDArray[np.float32]
CONTENT_TYPES = {
    "wav": "audio/wav",
    "pcm": "audio/pcm",
    "pcm16": "audio/pcm",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
}
_ENDLESS = 0xFFFFFFFF


def samples_of(media: dict[str, Any]) -> tuple[Samples, int]:
    """(samples [n] in [-1, 1], rate) of one output of a stage that makes sound.

    Raises:
        StageError: there is no sound in it.
    """
    if "audio" not in media:
        raise StageError("the model made no sound")
    samples = np.asarray(media["audio"], dtype=np.float32).reshape(-1)
    return samples, int(media["sr"])


def pcm16(samples: Samples) -> bytes:
    """Samples as 16-bit little-endian integers."""
    return (np.clip(samples, -1.0, 1.0) * 32767.0).round().astype("<i2").tobytes()


def wav_head(rate: int, data_bytes: int = _ENDLESS) -> bytes:
    """The head of a mono 16-bit WAV file; of one that is still being made without a length."""
    whole = _ENDLESS if data_bytes == _ENDLESS else 36 + data_bytes
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16)
    return b"RIFF" + struct.pack("<I", whole) + b"WAVE" + form + b"data" + struct.pack("<I", data_bytes)


def encode_sound(samples: Samples, rate: int, form: str) -> bytes:
    """A sound file: ``wav``, ``flac``, ``mp3``, ``opus`` (in Ogg), or bare samples (``pcm``, ``pcm16``)."""
    if form in ("pcm", "pcm16"):
        return pcm16(samples)
    if form == "wav":
        data = pcm16(samples)
        return wav_head(rate, len(data)) + data
    soundfile = optional("soundfile", "response_format")
    out = io.BytesIO()
    kind, coding = {"flac": ("FLAC", "PCM_16"), "mp3": ("MP3", None), "opus": ("OGG", "OPUS")}[form]
    exact = np.frombuffer(pcm16(samples), "<i2") if form == "flac" else samples
    soundfile.write(out, exact, rate, format=kind, subtype=coding)
    return out.getvalue()
