"""A no-op stage that makes videos: frames of one colour, which grows lighter. It reads a picture, too.

``hang`` in the prompt never answers, ``fail`` fails the request, ``float`` makes numbers in place of bytes.
"""

from __future__ import annotations

import numpy as np

from tests.entrypoints.noop_stage import NoopStage
from vllm_omni.engine.stage_engine import StageChunk, StageEvent, StageFailure, StageInfo, StageInput, StageProgress
from vllm_omni.errors import OutOfMemoryError


class VideoStage(NoopStage):
    """Films without a model."""

    def info(self) -> StageInfo:
        return StageInfo("VideoStage", facts={"inputs": ["image"]})

    def _work(self, request: StageInput) -> list[StageEvent]:
        words, params = request.prompt["prompt"].split(), request.sampling_params
        if "hang" in words:
            self.hanging.add(request.request_id)
            return [StageProgress(request.request_id, 3, 10)]
        if "fail" in words:
            return [StageFailure(request.request_id, OutOfMemoryError("no room"))]
        picture = (request.prompt.get("multi_modal_data") or {}).get("image")
        base = (params.seed or 0) % 200 if picture is None else 255 - picture.getpixel((0, 0))[0]
        count, height, width = min(params.num_frames or 5, 48), params.height or 32, params.width or 48
        frames = (
            np.full((count, height, width, 3), base, np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None, None]
        )
        video = frames.astype(np.float32) / 255 if "float" in words else frames
        steps = [StageProgress(request.request_id, step, 2) for step in (1, 2)]
        return [*steps, StageChunk(request.request_id, {"video": video, "fps": params.fps or 8})]
