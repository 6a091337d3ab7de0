"""``/v1/omni/info``: what the served model takes and makes, for people and for the playground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from vllm_omni.config.stage import StageConfig
from vllm_omni.engine.stage_engine import StageInfo
from vllm_omni.entrypoints.openai.chat_protocol import ChatCompletionRequest
from vllm_omni.entrypoints.openai.forms import MAX_FILES
from vllm_omni.entrypoints.openai.health import service_of
from vllm_omni.entrypoints.openai.images import ImageGenerationRequest
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.entrypoints.openai.speech import SpeechRequest
from vllm_omni.entrypoints.openai.videos import VideoRequest
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.version import __version__

router = APIRouter()

_PARAMETERS = ("negative_prompt", "num_inference_steps", "guidance_scale", "true_cfg_scale", "seed", "n")
_VIDEO_PARAMETERS = (
    *("negative_prompt", "num_inference_steps", "guidance_scale", "true_cfg_scale", "seed", "seconds", "num_frames"),
    "fps",
)
_CHAT_PARAMETERS = ("max_completion_tokens", "temperature", "top_p", "seed")
_CHAT_PICTURE_PARAMETERS = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "seed")
_SPEECH_PARAMETERS = ("input", "instructions", "max_new_tokens", "seed")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "maxLength", "enum")
_SHOWN_FACTS = ("device", "dtype")


@router.get("/v1/omni/info")
async def info(request: Request) -> dict[str, Any]:
    """The served model: its stages, and for pictures each parameter with its default and bounds."""
    service = service_of(request)
    infos = service.omni.stage_infos
    answer: dict[str, Any] = {
        "model": service.name,
        "version": __version__,
        "output_modalities": sorted(service.makes),
        "stages": [_stage(stage, infos[stage.stage_id]) for stage in service.omni.pipeline.stages],
    }
    if "image" in service.makes:
        answer["image"] = _image(service)
    if "video" in service.makes:
        answer["video"] = _video(service)
    if service.omni.renderer is not None:
        answer["chat"] = _chat(service)
        if "audio" in service.makes:
            answer["speech"] = _speech(service)
    elif "image" in answer:
        answer["chat"] = _chat_with_pictures(answer["image"])
    return answer


def _chat(service: Service) -> dict[str, Any]:
    """What may stand in a message beside text, how many of each (null: any number), and who may speak the answer."""
    processor = service.omni.renderer.mm_processor if service.omni.renderer is not None else None
    inputs = {} if processor is None else dict(processor.info.supported_mm_limits)
    given = service.omni.pipeline.stages[0].default_sampling_params
    defaults = {**given, "max_completion_tokens": given.get("max_tokens")}
    return {
        "answers": sorted(service.makes),
        "compat": service.args.compat,
        "inputs": inputs,
        "speaks": "audio" in service.makes,
        "voices": service.voices,
        "max_media_bytes": service.args.max_media_bytes,
        "parameters": _parameters(ChatCompletionRequest, _CHAT_PARAMETERS, defaults),
    }


def _chat_with_pictures(image: dict[str, Any]) -> dict[str, Any]:
    """A model that makes pictures answers with them."""
    shown = {name: image["parameters"][name] for name in _CHAT_PICTURE_PARAMETERS if name in image["parameters"]}
    reads = {name: image[name] for name in ("inputs", "max_media_bytes")}
    return {"answers": ["image"], **reads, "speaks": False, "voices": [], "parameters": shown}


def _speech(service: Service) -> dict[str, Any]:
    given = service.omni.pipeline.stages[0].default_sampling_params
    defaults = {"max_new_tokens": given.get("max_tokens"), "seed": given.get("seed")}
    return {"voices": service.voices, "parameters": _parameters(SpeechRequest, _SPEECH_PARAMETERS, defaults)}


def _stage(stage: StageConfig, said: StageInfo) -> dict[str, Any]:
    return {
        "stage_id": stage.stage_id,
        "type": stage.stage_type,
        "name": said.name,
        "ranks": said.ranks,
        "sources": list(stage.engine_input_source),
        "output": stage.final_output_type if stage.final_output else None,
        **{name: said.facts[name] for name in _SHOWN_FACTS if name in said.facts},
    }


def _image(service: Service) -> dict[str, Any]:
    """Parameters of a request for pictures. One that the model does not take is left out.

    A model that tells nothing of itself (a custom pipeline) takes them all, for all that the server knows.
    """
    facts, given = _sampling(service, "image")
    model = facts.get("sampling")
    bounds = _bounds(ImageGenerationRequest)
    defaults = {**(model or {}), **given, "n": given.get("num_outputs_per_prompt", 1)}
    taken = [name for name in _PARAMETERS if name != "guidance_scale" or model is None or model[name] is not None]
    return {
        "parameters": {name: {"default": defaults.get(name), **bounds[name]} for name in taken},
        "size": _size(service, model, defaults),
        "prompt": bounds["prompt"],
        **({"previews": bounds["partial_images"]} if facts.get("previews", True) else {}),
        "output_formats": bounds["output_format"]["enum"],
        **_pictures_in(service, MAX_FILES),
    }


def _video(service: Service) -> dict[str, Any]:
    """Parameters of a request for a video, as for pictures."""
    facts, given = _sampling(service, "video")
    model = facts.get("sampling")
    bounds = _bounds(VideoRequest)
    defaults = {**(model or {}), **given}
    return {
        "parameters": {name: {"default": defaults.get(name), **bounds[name]} for name in _VIDEO_PARAMETERS},
        "size": _size(service, model, defaults),
        "prompt": bounds["prompt"],
        **_pictures_in(service, 1),
    }


def _size(service: Service, model: Mapping[str, Any] | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    limit = service.args.max_generated_image_size
    return {
        "default": [defaults.get("width"), defaults.get("height")],
        "multiple": 1 if model is None else model["multiple"],
        "max_pixels": min(limit, (model or {}).get("max_pixels", limit)),
    }


def _pictures_in(service: Service, most: int) -> dict[str, Any]:
    """What may go along with a prompt, as for chats."""
    inputs = {"image": most} if "image" in service.reads else {}
    return {"inputs": inputs, "max_media_bytes": service.args.max_media_bytes}


def _sampling(service: Service, kind: str) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Facts of the stage that makes pictures or videos, and the parameters that its configuration sets."""
    omni = service.omni
    for stage, params in zip(omni.pipeline.stages, omni.default_sampling_params_list, strict=True):
        if isinstance(params, OmniDiffusionSamplingParams) and stage.final_output_type == kind:
            given = {name: value for name, value in vars(params).items() if value is not None}
            return omni.stage_infos[stage.stage_id].facts, given
    return {}, {}


def _parameters(body: type[BaseModel], names: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    bounds = _bounds(body)
    return {name: {"default": defaults.get(name), **bounds[name]} for name in names}


def _bounds(body: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """By field of a request: the bounds in its JSON schema. A field may also allow null."""
    kinds = {name: field.get("anyOf", [field])[0] for name, field in body.model_json_schema()["properties"].items()}
    return {name: {key: value for key, value in kind.items() if key in _BOUNDS} for name, kind in kinds.items()}
