"""A stage for measuring hops: the first makes chunks, the others pass them on, and each writes down its times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from vllm_omni.engine.stage_engine import StageChunk, StageEngine, StageEvent, StageInfo, StageInput


class ChunkStage(StageEngine):
    """Stage 0 answers a prompt with ``chunks`` chunks of its text, one every ``pace`` seconds (both in
    ``additional_information``); a later stage passes each on. ``times`` of a chunk has two numbers a stage, seconds of
    ``time.monotonic()``: when the work on it began, and when it was done."""

    def __init__(self, stage_id: int) -> None:
        self.stage_id = stage_id
        self.queue: list[StageInput] = []
        self.made = 0

    @classmethod
    def from_config(cls, stage_id: int, engine_args: dict[str, Any]) -> ChunkStage:
        return cls(stage_id)

    def info(self) -> StageInfo:
        return StageInfo("ChunkStage")

    def add_request(self, request: StageInput) -> None:
        self.queue.append(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        self.queue = [request for request in self.queue if request.request_id not in request_ids]

    def has_work(self) -> bool:
        return bool(self.queue)

    def step(self) -> list[StageEvent]:
        began = time.monotonic()
        request = self.queue[0]
        data = request.prompt
        last = request.last
        if self.stage_id == 0:
            given = data["additional_information"]
            time.sleep(given["pace"])
            self.made = (self.made + 1) % given["chunks"]
            last = not self.made
            data = {"payload": data["prompt"], "times": []}
        if last or self.stage_id:
            del self.queue[0]
        data["times"] += [began, time.monotonic()]
        return [StageChunk(request.request_id, data, last)]

    def close(self) -> None:
        self.queue.clear()
