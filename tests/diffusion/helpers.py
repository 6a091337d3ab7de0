"""What the engine's tests share: configurations of the fake pipeline, and driving an engine step by step."""

import hashlib
import os
import time
from collections.abc import Callable
from typing import Any

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.engine.stage_engine import StageChunk, StageEngine, StageEvent, StageFailure, StageInput
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

FAKE = "tests.diffusion.fake_pipeline"


def fake_config(pipeline: str = "FakePipeline", **kwargs: Any) -> OmniDiffusionConfig:
    """One rank of the fake pipeline on the CPU; ``cfg_parallel_size=2`` makes it two."""
    values: dict[str, Any] = {
        "model": "fake",
        "model_class_name": "FluxPipeline",
        "device": "cpu",
        "diffusion_load_format": "dummy",
        "custom_pipeline_args": {"pipeline_class": f"{FAKE}.{pipeline}"},
        "worker_extension_cls": f"{FAKE}.Extension",
        "dist_timeout": 30.0,
    }
    return OmniDiffusionConfig.from_kwargs(**{**values, **kwargs})


def request(request_id: str, prompt: Any = "a cup", deadline: float | None = None, **params: Any) -> StageInput:
    return StageInput(request_id, prompt, OmniDiffusionSamplingParams(**params), deadline)


def drain(engine: StageEngine, after_step: Callable[[int], None] | None = None) -> list[StageEvent]:
    """Step until there is no work left; every event in order."""
    events: list[StageEvent] = []
    steps = 0
    while engine.has_work():
        events.extend(engine.step())
        steps += 1
        if after_step is not None:
            after_step(steps)
        assert steps < 10_000
    return events


def results(events: list[StageEvent]) -> dict[str, dict[str, Any]]:
    return {event.request_id: event.data for event in events if isinstance(event, StageChunk)}


def failures(events: list[StageEvent]) -> dict[str, Any]:
    return {event.request_id: event.error for event in events if isinstance(event, StageFailure)}


def digest(data: dict[str, Any]) -> str:
    """Hash of the pixels of a result."""
    return hashlib.sha256(b"".join(picture.tobytes() for picture in data["images"])).hexdigest()


def alive(pid: int) -> bool:
    """Whether process ``pid`` runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until ``condition`` held; fails after ``seconds``. For what happens in other processes."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not happen in time"
        os.sched_yield()
    return time.monotonic() - started
