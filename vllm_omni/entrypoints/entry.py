"""What goes with a prompt into the stages that read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_omni.errors import RequestError


def entry_options(
    prompt: Any, lora_request: Any, priority: int, loose: Mapping[str, Any] | None, on_vllm: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where an adapter and a priority go.

    Args:
        prompt: as the caller gave it; its dictionary may hold both.
        lora_request: adapter, or None.
        priority: 0 for none.
        loose: sampling parameters of diffusion stages that were given by name.
        on_vllm: whether the stage that reads the prompt runs on vLLM.

    Returns:
        What is added to the prompt, and ``loose`` with what a diffusion stage takes instead.

    Raises:
        RequestError: given twice, or no stage takes it.
    """
    options = {"lora_request": lora_request} if lora_request is not None else {}
    if priority != 0:
        options["priority"] = priority
    named = [key for key in ("lora_request", "priority") if isinstance(prompt, Mapping) and key in prompt]
    for key in named:
        if key in options:
            raise RequestError(f"{key} given twice, beside the prompt and in it", field=key)
    if on_vllm:
        return options, dict(loose or {})
    for key in named:
        raise RequestError(f"prompt: {key} is for stages on vLLM; give it as a sampling parameter", field=key)
    if "priority" in options:
        raise RequestError(f"priority={priority!r}: diffusion stages serve requests as they come", field="priority")
    return {}, {**(loose or {}), **options}
