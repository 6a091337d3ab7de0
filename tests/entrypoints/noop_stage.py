"""A ``StageEngine`` without torch and without compute, for tests and for measuring the orchestration alone.

What it does with a request stands in the prompt (a dictionary; text is an echo):

- ``chunks``: number of outputs, one a step; each passes the payload on with a trace of the stages it went through;
- ``fail``: id of the stage that fails the request; ``die``: of the one whose engine raises; ``hang``: of the one that
  never answers; ``kill``: of the one that ends its own process by SIGKILL;
- ``times``: every stage notes when it worked on the chunk; ``pace``: seconds of work per chunk in stage 0.
"""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_omni.engine.stage_engine import (
    StageChunk,
    StageEngine,
    StageEvent,
    StageFailure,
    StageInfo,
    StageInput,
    StageProgress,
)
from vllm_omni.errors import ConfigError, RequestError


class NoopStage(StageEngine):
    """Echoes its input."""

    def __init__(self, stage_id: int, engine_args: dict[str, Any]) -> None:
        known = {"model", "refuse", "load_seconds", "max_num_seqs", "devices", "report", "progress", "at_exit"}
        for name in engine_args:
            if name not in known:
                raise ConfigError(f"unknown {name}", field=name)
        if engine_args.get("refuse"):
            raise ConfigError(f"refused: {engine_args['refuse']}", field="refuse")
        if engine_args.get("load_seconds"):
            time.sleep(engine_args["load_seconds"])
        if engine_args.get("at_exit"):
            atexit.register(Path(engine_args["at_exit"]).touch)
        self.stage_id = stage_id
        self.args = engine_args
        self.queue: list[StageInput] = []
        self.left: dict[str, int] = {}
        self.hanging: set[str] = set()
        self.aborted: list[str] = []
        self.batches: list[int] = []
        self.profile: str | None = None

    @classmethod
    def from_config(cls, stage_id: int, engine_args: dict[str, Any]) -> NoopStage:
        return cls(stage_id, engine_args)

    def info(self) -> StageInfo:
        return StageInfo("NoopStage", facts={"args": dict(self.args), "pid": os.getpid()})

    def add_request(self, request: StageInput) -> None:
        self.queue.append(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted.extend(request_ids)
        self.hanging.difference_update(request_ids)
        self.queue = [request for request in self.queue if request.request_id not in request_ids]

    def has_work(self) -> bool:
        return bool(self.queue)

    def step(self) -> list[StageEvent]:
        self.batches.append(len(self.queue))
        taken, self.queue = self.queue, []
        events: list[StageEvent] = []
        for request in taken:
            events.extend(self._work(request))
        return events

    def _work(self, request: StageInput) -> list[StageEvent]:
        prompt = request.prompt
        if not isinstance(prompt, dict):
            prompt = {"prompt": prompt}
        info = dict(prompt.get("additional_information") or {})
        if info.get("hang") == self.stage_id:
            self.hanging.add(request.request_id)
            return []
        if info.get("fail") == self.stage_id:
            return [StageFailure(request.request_id, RequestError("told to fail", field="fail"))]
        if info.get("die") == self.stage_id:
            raise ValueError("told to die")
        if info.get("kill") == self.stage_id:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._answer(request, prompt, info)

    def _answer(self, request: StageInput, prompt: dict[str, Any], info: dict[str, Any]) -> list[StageEvent]:
        total = int(info.get("chunks", 1)) if self.stage_id == 0 else 1
        done = total - self.left.setdefault(request.request_id, total)
        self.left[request.request_id] -= 1
        last = request.last and self.left[request.request_id] <= 0
        if self.left[request.request_id] > 0:
            self.queue.append(request)
        if last or self.left[request.request_id] <= 0:
            del self.left[request.request_id]
        if info.get("odd") == "complex":
            info["odd"] = 1j
        if "pace" in info and self.stage_id == 0:
            time.sleep(info["pace"])
        if "times" in info:
            info["times"] = [*(info["times"] if isinstance(info["times"], list) else []), time.monotonic()]
        trace = [*info.get("trace", []), self.stage_id]
        number = done if self.stage_id == 0 else request.chunk
        data = {
            "prompt": prompt.get("prompt"),
            "additional_information": {**info, "trace": trace, "number": number},
            "seen": self._report(request),
        }
        now = time.monotonic()
        spans = [("answer", now, now, {"number": number})] if request.traced else []
        events: list[StageEvent] = []
        if self.args.get("progress"):
            events += [StageProgress(request.request_id, step, 3) for step in (1, 2, 3)]
        return [*events, StageChunk(request.request_id, data, finished=last, spans=spans)]

    def _report(self, request: StageInput) -> dict[str, Any]:
        if not self.args.get("report"):
            return {}
        return {
            "params": request.sampling_params,
            "batch": self.batches[-1],
            "deadline": request.deadline,
            "chunk": request.chunk,
            "modules": _heavy_modules(),
        }

    def check_health(self) -> None:
        return

    def start_profile(self, folder: str) -> None:
        self.profile = folder

    def stop_profile(self) -> list[str]:
        assert self.profile is not None
        folder, self.profile = self.profile, None
        return [f"{folder}/trace.json"]

    def call(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        return [getattr(self, method)(*args, **kwargs)]

    def state(self) -> dict[str, Any]:
        """What a test wants to know of the engine."""
        return {
            "hanging": sorted(self.hanging),
            "aborted": list(self.aborted),
            "queue": len(self.queue),
            "batches": list(self.batches),
        }

    def arguments(self) -> dict[str, Any]:
        """What the engine was built with."""
        return self.args

    def environment(self) -> dict[str, str]:
        """Of its process."""
        return dict(os.environ)

    def close(self) -> None:
        self.queue = []


def _heavy_modules() -> list[str]:
    import sys

    return [name for name in ("torch", "numpy", "vllm", "diffusers", "pydantic") if name in sys.modules]
