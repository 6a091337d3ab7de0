"""What goes with a prompt into the stages that read it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vllm_omni.config.schema import nearest
from vllm_omni.engine.stage_engine import StageInfo
from vllm_omni.entrypoints.stage_graph import StageNode
from vllm_omni.errors import RequestError
from vllm_omni.inputs.edge import ReadingEdge


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


def information_keys(nodes: Iterable[StageNode], infos: Mapping[int, StageInfo]) -> frozenset[str] | None:
    """What a prompt's ``additional_information`` may hold: keys that an edge or a stage that gets the prompt reads.

    None where one of them does not say what it reads, since then any key may be meant.
    """
    keys: set[str] = set()
    for node in nodes:
        edge, said = node.process_input, infos[node.stage_id].facts.get("information")
        if node.sources:
            said = edge.keys if isinstance(edge, ReadingEdge) else None
        if said is None:
            return None
        keys.update(said)
    return frozenset(keys)


def check_information(prompt: Any, keys: Collection[str] | None) -> None:
    """Check a prompt's ``additional_information``.

    Raises:
        RequestError: a key that is not among ``keys``, which nobody would read.
    """
    given = prompt.get("additional_information") if isinstance(prompt, Mapping) else None
    if keys is None or not given:
        return
    for key in given:
        if key not in keys:
            known = nearest(str(key), keys) if keys else "; the model reads none"
            raise RequestError(
                f"additional_information: unknown key {key!r}{known}", field=str(key), allowed=sorted(keys)
            )
