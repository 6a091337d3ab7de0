"""A stage that paints, so that the command line can be tested in a second: one colour a seed, one step at a time.

The prompt may say what goes wrong: ``wait`` never ends, ``refused`` fails the request, ``die`` ends the stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vllm_omni.engine.stage_engine import (
    StageChunk,
    StageEngine,
    StageEvent,
    StageFailure,
    StageInfo,
    StageInput,
    StageProgress,
)
from vllm_omni.errors import RequestError

DEFAULT_STEPS = 3


@dataclass
class _Open:
    request: StageInput
    done: int = 0


class PictureStage(StageEngine):
    """Paints rectangles."""

    def __init__(self) -> None:
        self.open: dict[str, _Open] = {}

    @classmethod
    def from_config(cls, stage_id: int, engine_args: dict[str, Any]) -> PictureStage:
        return cls()

    def info(self) -> StageInfo:
        return StageInfo("PictureStage")

    def add_request(self, request: StageInput) -> None:
        self.open[request.request_id] = _Open(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.open.pop(request_id, None)

    def has_work(self) -> bool:
        return any(_text(item.request) != "wait" for item in self.open.values())

    def step(self) -> list[StageEvent]:
        events: list[StageEvent] = []
        for request_id, item in list(self.open.items()):
            text, params = _text(item.request), item.request.sampling_params
            if text == "wait":
                continue
            if text == "die":
                raise ValueError("told to die")
            if text == "refused":
                del self.open[request_id]
                events.append(StageFailure(request_id, RequestError("told to refuse", field="prompt")))
                continue
            total = params.num_inference_steps or DEFAULT_STEPS
            item.done += 1
            events.append(StageProgress(request_id, item.done, total))
            if item.done == total:
                del self.open[request_id]
                events.append(StageChunk(request_id, _paint(item.request, total)))
        return events

    def close(self) -> None:
        return


def _text(request: StageInput) -> str:
    prompt = request.prompt
    return prompt if isinstance(prompt, str) else str(prompt["prompt"])


def _paint(request: StageInput, steps: int) -> dict[str, Any]:
    params = request.sampling_params
    seed = 7 if params.seed is None else params.seed
    size = (params.width or 16, params.height or 16)
    pictures: list[Any] = [
        Image.new("RGB", size, (seed % 256, index * 50, steps)) for index in range(params.num_outputs_per_prompt)
    ]
    if params.output_type == "np":
        pictures = [np.asarray(picture, dtype=np.float32) / 255 for picture in pictures]
    return {"images": pictures, "metrics": {"seed": seed, "num_inference_steps": steps}}
