"""Names of a model's voices."""

from __future__ import annotations

from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.errors import NotFoundError


def voices_of(omni: AsyncOmni) -> list[str]:
    """The voices that the served checkpoint has; empty for a model that does not speak."""
    config = omni.checkpoint_config
    stages = omni.pipeline.stages
    if config is None or not any(stage.final_output and stage.final_output_type == "audio" for stage in stages):
        return []
    if config.model_type == "qwen3_omni_moe":
        return [str(name) for name in config.talker_config.speaker_id]
    if config.model_type == "qwen2_5_omni":
        from vllm_omni.model_executor.models.qwen2_5_omni.voices import load_voices

        return list(load_voices(str(stages[0].engine_args["model"]), stages[0].engine_args.get("revision")))
    return []


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
