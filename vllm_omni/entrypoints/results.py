"""From a stage's output to what the caller gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_omni.distributed.omni_connectors.utils.serialization import resolve
from vllm_omni.entrypoints.stage_graph import StageNode
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.request import OmniRequest

_OWN = ("images", "latents", "metrics", "multimodal_output")


def build_output(
    node: StageNode, request: OmniRequest, data: Mapping[str, Any], finished: bool, stage_times: Mapping[str, Any]
) -> OmniRequestOutput:
    """The caller's view of one output of a final stage.

    ``data`` is what the engine named: ``images``, ``latents``, ``metrics`` and ``multimodal_output`` go to the fields
    of these names, everything else into ``multimodal_output``. ``metrics["stages"]`` holds, by stage id, the seconds
    that the request waited in the driver (``wait_s``), was on its way (``transfer_s``), waited in the stage
    (``queue_s``) and was worked on (``run_s``).
    """
    loaded = {name: resolve(value) for name, value in data.items()}
    metrics = {**loaded.get("metrics", {}), "stages": dict(stage_times)}
    others = {name: value for name, value in loaded.items() if name not in _OWN}
    output = OmniRequestOutput.from_diffusion(
        request_id=request.request_id,
        images=loaded.get("images", []),
        prompt=request.prompt,
        metrics=metrics,
        latents=loaded.get("latents"),
        multimodal_output={**loaded.get("multimodal_output", {}), **others},
        final_output_type=node.final_output_type,
        stage_id=node.stage_id,
    )
    output.finished = finished
    return output
