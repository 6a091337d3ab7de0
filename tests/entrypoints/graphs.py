"""Stage configurations of no-op stages, and functions for their edges."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from vllm_omni.inputs.edge import EdgeInput

NOOP = "tests.entrypoints.noop_stage.NoopStage"
HERE = "tests.entrypoints.graphs"


def stage(stage_id: int, sources: list[int] | None = None, final: str | None = None, **values: Any) -> dict[str, Any]:
    """One no-op stage; ``engine`` are further engine arguments."""
    out: dict[str, Any] = {
        "stage_id": stage_id,
        "stage_type": "diffusion",
        "engine_args": {"engine_cls": NOOP, **values.pop("engine", {})},
        **values,
    }
    if sources is not None:
        out["engine_input_source"] = sources
    if final is not None:
        out |= {"final_output": True, "final_output_type": final}
    return out


def chain(count: int, **values: Any) -> list[dict[str, Any]]:
    """``count`` stages in a row; the last one's output is final."""
    return [
        stage(i, [i - 1] if i else None, "text" if i == count - 1 else None, **{k: dict(v) for k, v in values.items()})
        for i in range(count)
    ]


def write(folder: Path, stages: list[dict[str, Any]], **top: Any) -> str:
    """Write a stage configuration; returns its path."""
    path = folder / "stages.yaml"
    path.write_text(yaml.safe_dump({"stage_args": stages, **top}, sort_keys=False), encoding="utf-8")
    return str(path)


def ask(text: str = "hello", **info: Any) -> dict[str, Any]:
    """A prompt with orders for the no-op stages."""
    return {"prompt": text, "additional_information": info}


def trace(output: Any) -> list[int]:
    """Stages that an output went through."""
    return list(output.multimodal_output["additional_information"]["trace"])


async def until(true: Callable[[], bool]) -> None:
    """Let the event loop turn until ``true()``."""
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0)


def merge(edge: EdgeInput) -> dict[str, Any]:
    """Texts of all sources, in order of their ids; the trace of each."""
    info = dict(edge.prompt["additional_information"]) if isinstance(edge.prompt, dict) else {}
    traces = {key: [chunk["additional_information"]["trace"] for chunk in edge.outputs[key]] for key in edge.outputs}
    text = "+".join(str(chunk["prompt"]) for key in sorted(edge.outputs) for chunk in edge.outputs[key])
    return {"prompt": text, "additional_information": {**info, "traces": traces, "trace": []}}


def upper(edge: EdgeInput) -> dict[str, Any]:
    """The source's text in capitals."""
    (outputs,) = edge.outputs.values()
    return {**outputs[0], "prompt": str(outputs[0]["prompt"]).upper()}


def numbered(edge: EdgeInput) -> dict[str, Any] | None:
    """Every second call sends what came since; the number of calls so far is kept in ``carry``."""
    (outputs,) = edge.outputs.values()
    edge.carry.setdefault("kept", []).extend(chunk["additional_information"]["number"] for chunk in outputs)
    if len(edge.carry["kept"]) < 2 and not edge.last:
        return None
    kept, edge.carry["kept"] = edge.carry["kept"], []
    return {"prompt": ",".join(map(str, kept)), "additional_information": {"trace": [0]}} if kept else None


def raises(edge: EdgeInput) -> None:
    """An edge with a bug."""
    raise KeyError("no such thing")


def not_needed(edge: EdgeInput) -> None:
    """An edge that never asks its stage for anything."""
    return


def thread_inside(edge: EdgeInput) -> dict[str, Any]:
    """An edge that returns what cannot travel."""
    import threading

    return {"prompt": "x", "additional_information": {"lock": threading.Lock()}}
