"""A no-op stage that draws: one colour, of the size asked for. Words in the prompt tell it what to do.

``noise`` draws what cannot be compressed, ``hang`` never answers, ``steps`` reports three steps first, ``kill`` ends
the process, ``fail`` fails the request, ``slow`` takes a quarter of a second.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from PIL import Image

from tests.entrypoints.noop_stage import NoopStage
from vllm_omni.engine.stage_engine import StageChunk, StageEvent, StageFailure, StageInput, StageProgress
from vllm_omni.errors import OutOfMemoryError, RequestError


class PictureStage(NoopStage):
    """Draws without a model."""

    def _work(self, request: StageInput) -> list[StageEvent]:
        prompt = request.prompt if isinstance(request.prompt, dict) else {"prompt": request.prompt}
        words, params = prompt["prompt"].split(), request.sampling_params
        if "hang" in words:
            self.hanging.add(request.request_id)
            return [StageProgress(request.request_id, 1, 9)]
        if "fail" in words:
            return [StageFailure(request.request_id, RequestError("height=7: told to fail", field="height"))]
        if "oom" in words:
            return [StageFailure(request.request_id, OutOfMemoryError("no room"))]
        if "kill" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        if "slow" in words:
            time.sleep(0.25)
        events: list[StageEvent] = []
        if "steps" in words:
            events += [StageProgress(request.request_id, step, 3) for step in (1, 2, 3)]
        colour = (len(words), len(prompt.get("negative_prompt", "")), params.seed or 0)
        image = Image.new("RGB", (params.width or 32, params.height or 16), colour)
        if "noise" in words:
            image = Image.frombytes("RGB", image.size, os.urandom(3 * image.width * image.height))
        metrics: dict[str, Any] = {"seed": params.seed, "num_inference_steps": params.num_inference_steps}
        data = {"images": [image] * params.num_outputs_per_prompt, "metrics": metrics}
        return [*events, StageChunk(request.request_id, data)]
