"""Voices of a Qwen2.5-Omni checkpoint, from its ``spk_dict.pt``."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from vllm_omni.config.schema import nearest
from vllm_omni.errors import ConfigError, RequestError

FILE = "spk_dict.pt"
DEFAULT = "Chelsie"
"""Voice of requests that name none, where the checkpoint has it; otherwise its first voice."""


@dataclass(frozen=True)
class Voice:
    """One voice."""

    name: str
    bos_token: int
    """Text token that opens the talker's reply."""
    speaker: torch.Tensor
    """Speaker embedding, [enc_emb_dim] float32."""
    ref_mel: torch.Tensor
    """Log-mel spectrogram of a recording, [frames, mel_dim] float32."""


class Voices(Mapping[str, Voice]):
    """Voices by name."""

    def __init__(self, voices: Mapping[str, Voice]) -> None:
        self._voices = dict(voices)
        self.default = DEFAULT if DEFAULT in self._voices else next(iter(self._voices))

    def __getitem__(self, name: str) -> Voice:
        return self._voices[name]

    def __iter__(self) -> Any:
        return iter(self._voices)

    def __len__(self) -> int:
        return len(self._voices)

    def pick(self, name: Any) -> Voice:
        """The voice that a request asks for, in whatever case; ``None`` asks for the default one.

        Raises:
            RequestError: the checkpoint has no such voice.
        """
        if name is None:
            name = self.default
        known = {voice.casefold(): voice for voice in self._voices}
        if not isinstance(name, str) or name.casefold() not in known:
            hint = nearest(str(name), self._voices)
            raise RequestError(
                f"speaker={name!r} is not a voice of this model{hint}",
                field="speaker",
                value=str(name),
                allowed=", ".join(self._voices),
            )
        return self._voices[known[name.casefold()]]


def load_voices(model: str, revision: str | None = None, cache_dir: str | None = None) -> Voices:
    """Read the voices of checkpoint ``model`` (a folder, or a name on the hub). Nothing in the file is executed.

    Raises:
        ConfigError: the file is missing, cannot be read, or does not have the form of the release.
    """
    try:
        path = cached_file(model, FILE, revision=revision, cache_dir=cache_dir)
    except OSError as error:
        raise ConfigError(f"{model}: no {FILE}: {error}", field="model") from error
    return read_voices(Path(str(path)))


def read_voices(path: Path) -> Voices:
    """Read ``spk_dict.pt``.

    Raises:
        ConfigError: see ``load_voices``.
    """
    try:
        entries = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path} cannot be read as tensors: {error}", field="model") from error
    if not isinstance(entries, Mapping) or not entries:
        raise ConfigError(f"{path}: expected a dictionary of voices", field="model")
    return Voices({str(name): _voice(str(name), entry, path) for name, entry in entries.items()})


def _voice(name: str, entry: Any, path: Path) -> Voice:
    try:
        speaker, ref_mel, bos = entry["cond"], entry["ref_mel"], int(entry["bos_token"])
        speaker, ref_mel = speaker.float().reshape(-1), ref_mel.float().reshape(-1, ref_mel.shape[-1])
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{path}: voice {name!r} needs bos_token, cond and ref_mel: {error!r}", field="model"
        ) from error
    return Voice(name, bos, speaker, ref_mel)
