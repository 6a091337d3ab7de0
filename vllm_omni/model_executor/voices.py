"""Names of the voices that a checkpoint has, known before any stage runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_omni.errors import RequestError


def voices_of(config: Any, model: str, revision: str | None = None) -> tuple[str, ...]:
    """The voices of a checkpoint; none for a family without.

    Args:
        config: the checkpoint's configuration as transformers reads it.
        model: its folder or name.
        revision: of the name.
    """
    if config.model_type == "qwen3_omni_moe":
        return tuple(str(name) for name in config.talker_config.speaker_id)
    if config.model_type == "qwen2_5_omni":
        from vllm_omni.model_executor.models.qwen2_5_omni.voices import load_voices

        return tuple(load_voices(model, revision))
    return ()


def check_speaker(prompt: Any, voices: Sequence[str]) -> None:
    """Check the voice that a prompt asks for, in whatever case it is written.

    Raises:
        RequestError: the checkpoint has no such voice.
    """
    information = prompt.get("additional_information") if isinstance(prompt, Mapping) else None
    wanted = information.get("speaker") if isinstance(information, Mapping) else None
    if wanted is None or not voices:
        return
    if not isinstance(wanted, str) or wanted.casefold() not in {voice.casefold() for voice in voices}:
        raise RequestError(
            f"speaker={wanted!r}: the voices are {', '.join(voices)}",
            field="speaker",
            value=str(wanted),
            allowed=list(voices),
        )
