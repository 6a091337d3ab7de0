"""From a stage's output to what the caller gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_omni.distributed.omni_connectors.utils.serialization import resolve
from vllm_omni.entrypoints.stage_graph import StageNode
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.request import OmniRequest

_OWN = ("images", "latents", "metrics", "multimodal_output")


def shown_part(data: dict[str, Any], finished: bool) -> dict[str, Any] | None:
    """What the caller gets of an output; None when it is for the next stage alone.

    A stage that makes tokens sends every step; the caller gets vLLM's ``RequestOutput`` when there is one.
    """
    if "token_ids" not in data:
        return data
    if "request_output" in data:
        return {"request_output": data["request_output"]}
    return {} if finished else None


def build_output(
    node: StageNode, request: OmniRequest, data: Mapping[str, Any], finished: bool, stage_times: Mapping[str, Any]
) -> OmniRequestOutput:
    """The caller's view of one output of a final stage.

    ``data`` is what the engine named: ``request_output`` is vLLM's own; ``images``, ``latents``, ``metrics`` and
    ``multimodal_output`` go to the fields of these names, everything else into ``multimodal_output``.
    ``metrics["stages"]`` holds, by stage id, the second at which the request came to the stage (``start_s``, counted
    from the request's own start), and the seconds that it waited in the driver (``wait_s``), was on its way
    (``transfer_s``, the sum of ``transfer_in_s`` and ``transfer_out_s``), waited in the stage (``queue_s``) and was
    worked on (``run_s``); and the bytes to the stage and back (``bytes_in``, ``bytes_out``).
    """
    loaded = {name: resolve(value) for name, value in data.items()}
    metrics = {**loaded.get("metrics", {}), "stages": dict(stage_times)}
    if "request_output" in loaded:
        made = loaded["request_output"]
        made.request_id = request.request_id
        output = OmniRequestOutput.from_pipeline(node.stage_id, node.final_output_type, made)
        output.prompt, output.metrics = request.prompt, metrics
        return output
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


def join(outputs: Sequence[OmniRequestOutput]) -> list[OmniRequestOutput]:
    """One output a request and stage: what came in pieces, in order, made whole.

    Sound is put together; of a text, which each output holds from its beginning, the last stays.
    """
    whole: dict[tuple[str, int | None], OmniRequestOutput] = {}
    for output in outputs:
        key = (output.request_id, output.stage_id)
        before = whole.get(key)
        if before is not None:
            media, new = before.multimodal_output, output.multimodal_output
            if "audio" in media and "audio" in new:
                new["audio"] = _concatenate(media["audio"], new["audio"])
            output.multimodal_output = {**media, **new}
            output.images = [*before.images, *output.images]
        whole[key] = output
    return list(whole.values())


def _concatenate(first: Any, second: Any) -> Any:
    import torch

    return torch.cat([first, second], dim=-1)
