"""Names of a model's voices."""

from __future__ import annotations

from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.errors import NotFoundError


def voices_of(omni: AsyncOmni) -> list[str]:
    """The voices that the served checkpoint has; empty for a model that does not speak."""
    return list(omni.voices)


def pick_voice(name: str | None, voices: list[str], field: str) -> str | None:
    """The voice that ``name`` means, in whatever case it is written; None stays None.

    Raises:
        NotFoundError: there is no such voice.
    """
    if name is None:
        return None
    for voice in voices:
        if voice.casefold() == name.casefold():
            return voice
    raise NotFoundError(f"{field}={name!r}: the voices are {', '.join(voices)}", field=field, code="voice_not_found")
