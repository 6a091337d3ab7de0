"""Defaults of a model, and the one place where a request is checked against it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_omni.config.schema import nearest
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.utils.checkpoint import read_config
from vllm_omni.errors import ConfigError, RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

# Parameters that no text-to-image model honours; each means something to another kind of model.
_OTHER_KINDS = {
    "guidance_scale_2": "it belongs to models with two experts",
    "num_frames": "it belongs to video models",
    "fps": "it belongs to video models",
    "lora_request": "adapters are not supported yet",
    "lora_scale": "adapters are not supported yet",
}
_PROMPT_KEYS = ("prompt", "negative_prompt")
MOST_PICTURES = 16
"""How many times larger than the model's own size a picture may be, unless the configuration says otherwise."""
GENERATION_CONFIG = "generation_config.json"
"""File of a checkpoint with sampling defaults of its own, as transformers' models have it."""


@dataclass(frozen=True)
class SamplingDefaults:
    """What a model takes when a request does not say, and what it can take at all."""

    num_inference_steps: int
    """Steps."""
    guidance_scale: float | None
    """Embedded guidance; None for a model that has none."""
    true_cfg_scale: float
    """Classifier-free guidance; applies when there is a negative prompt."""
    max_sequence_length: int
    """Text tokens kept."""
    max_sequence_length_limit: int
    """Most text tokens that may be asked for."""
    negative_prompt: str | None = None
    """Negative prompt of prompts that bring none; only for models that are meant to be guided always."""
    height: int = 1024
    """Height in pixels."""
    width: int = 1024
    """Width in pixels."""
    multiple: int = 16
    """Height and width must be multiples of this."""
    honoured: frozenset[str] = field(default_factory=frozenset)
    """Parameters of other kinds of models that this one honours."""
    extra_args: frozenset[str] = field(default_factory=frozenset)
    """Keys of ``extra_args`` that the model reads."""


_OF_A_CHECKPOINT = (
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "max_sequence_length",
    "negative_prompt",
    "height",
    "width",
)


def checkpoint_defaults(defaults: SamplingDefaults, folder: Path) -> SamplingDefaults:
    """``defaults`` with those of the checkpoint's own ``generation_config.json`` over them, where it has one.

    Raises:
        ConfigError: a key that is not a default of the model, or a value that no request could have.
    """
    if not (folder / GENERATION_CONFIG).is_file():
        return defaults
    values = read_config(folder, GENERATION_CONFIG)
    known = [name for name in _OF_A_CHECKPOINT if name != "guidance_scale" or defaults.guidance_scale is not None]
    for key in values:
        if key not in known:
            raise ConfigError(f"{folder / GENERATION_CONFIG}: unknown key {key!r}{nearest(key, known)}", field=key)
    merged = replace(defaults, **values)
    probe = OmniDiffusionSamplingParams(**{key: item for key, item in values.items() if key != "negative_prompt"})
    try:
        probe.validate()
        resolve_request(OmniDiffusionRequest([""], probe), merged, str(folder / GENERATION_CONFIG), 0)
    except RequestError as error:
        raise ConfigError(f"{folder / GENERATION_CONFIG}: {error.message}", **error.details) from error
    return merged


def resolve_request(
    req: OmniDiffusionRequest, defaults: SamplingDefaults, model: str, default_seed: int | None
) -> OmniDiffusionRequest:
    """A copy of ``req`` with every default filled in; resolving twice changes nothing.

    Raises:
        RequestError: names the field, its value and what is allowed.
    """
    params = req.sampling_params.clone()
    params.validate()
    _check_prompts(req, model)
    _check_honoured(params, defaults, model)
    _check_guidance(req, params, defaults, model)
    for name in ("height", "width", "guidance_scale", "true_cfg_scale", "max_sequence_length"):
        if getattr(params, name) is None:
            setattr(params, name, getattr(defaults, name))
    if params.num_inference_steps is None:
        params.num_inference_steps = len(params.sigmas) if params.sigmas is not None else defaults.num_inference_steps
    _check_ranges(params, defaults, model)
    if defaults.negative_prompt is not None and params.true_cfg_scale is not None and params.true_cfg_scale > 1:
        req = replace(req, prompts=[_with_negative(prompt, defaults.negative_prompt) for prompt in req.prompts])
    if params.seed is None and params.generator is None and params.latents is None:
        params.seed = secrets.randbits(32) if default_seed is None else default_seed
    return replace(req, sampling_params=params)


def _with_negative(prompt: Any, text: str) -> Any:
    own = {"prompt": prompt} if isinstance(prompt, str) else prompt
    return own if own.get("negative_prompt") is not None else {**own, "negative_prompt": text}


def _check_prompts(req: OmniDiffusionRequest, model: str) -> None:
    if not req.prompts:
        raise RequestError("prompts is empty: give at least one", field="prompts")
    for prompt in req.prompts:
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, dict) or not isinstance(prompt.get("prompt"), str):
            raise RequestError(
                f'prompt={prompt!r}: {model} takes text, or {{"prompt": text, "negative_prompt": text}}', field="prompt"
            )
        for key, value in prompt.items():
            if key not in _PROMPT_KEYS and value:
                raise RequestError(
                    f"prompt has {key!r}, which {model} does not take{nearest(key, _PROMPT_KEYS)}", field=key
                )
        negative = prompt.get("negative_prompt")
        if negative is not None and not isinstance(negative, str):
            raise RequestError(f"negative_prompt={negative!r}: expected text", field="negative_prompt")


def _check_honoured(params: OmniDiffusionSamplingParams, defaults: SamplingDefaults, model: str) -> None:
    for name, why in _OTHER_KINDS.items():
        value = getattr(params, name)
        if value is not None and name not in defaults.honoured:
            raise RequestError(f"{name}={value!r}: {model} does not honour it; {why}", field=name, value=repr(value))
    for key in params.extra_args:
        if key not in defaults.extra_args:
            known = f"known are {', '.join(sorted(defaults.extra_args))}" if defaults.extra_args else "it reads none"
            raise RequestError(f"extra_args[{key!r}]: {model} does not read it; {known}", field=f"extra_args.{key}")


def _check_guidance(
    req: OmniDiffusionRequest, params: OmniDiffusionSamplingParams, defaults: SamplingDefaults, model: str
) -> None:
    # 0 says "no guidance" and is what model cards write for distilled models: that is honoured by having none.
    if params.guidance_scale and defaults.guidance_scale is None:
        raise RequestError(
            f"guidance_scale={params.guidance_scale}: {model} has no embedded guidance; "
            "use true_cfg_scale with a negative_prompt",
            field="guidance_scale",
            value=params.guidance_scale,
        )
    given = [text is not None for text in req.negative_texts()]
    if any(given) and not all(given):
        raise RequestError(
            "negative_prompt: give one to every prompt of a request, or to none", field="negative_prompt"
        )
    if any(given) and params.true_cfg_scale is None and defaults.true_cfg_scale <= 1:
        raise RequestError(
            f"negative_prompt has no effect: {model} guides with true_cfg_scale={defaults.true_cfg_scale} by default; "
            "set true_cfg_scale above 1",
            field="negative_prompt",
        )


def _check_ranges(params: OmniDiffusionSamplingParams, defaults: SamplingDefaults, model: str) -> None:
    for name in ("height", "width"):
        value = getattr(params, name)
        if value % defaults.multiple:
            low = value // defaults.multiple * defaults.multiple
            raise RequestError(
                f"{name}={value}: {model} needs a multiple of {defaults.multiple}, such as "
                f"{max(low, defaults.multiple)} or {low + defaults.multiple}",
                field=name,
                value=value,
                allowed=f"multiples of {defaults.multiple}",
            )
    limit = defaults.max_sequence_length_limit
    if params.max_sequence_length is not None and params.max_sequence_length > limit:
        raise RequestError(
            f"max_sequence_length={params.max_sequence_length}: {model} takes at most {limit}",
            field="max_sequence_length",
            value=params.max_sequence_length,
            allowed=f"1 to {limit}",
        )
    if params.sigmas is not None and not all(0 < sigma <= 1 for sigma in params.sigmas):
        raise RequestError(f"sigmas={params.sigmas}: each must be above 0 and at most 1", field="sigmas")


def check_pixels(params: OmniDiffusionSamplingParams, limit: int) -> None:
    """Refuse pictures that would hold up the stage, or its memory, for everybody else.

    Raises:
        RequestError: a picture has more than ``limit`` pixels, or all of a request together four times as many.
    """
    assert params.height is not None
    assert params.width is not None
    pixels, count = params.height * params.width, params.num_outputs_per_prompt
    if pixels > limit:
        raise RequestError(
            f"{params.width}x{params.height} has {pixels} pixels; a picture may have {limit} (max_pixels)",
            field="height",
            value=params.height,
            allowed=f"{limit} pixels",
        )
    if count * pixels > 4 * limit:
        raise RequestError(
            f"{count} pictures of {params.width}x{params.height}: a request may have {4 * limit} pixels in all (four "
            "times max_pixels)",
            field="num_outputs_per_prompt",
            value=count,
            allowed=f"{4 * limit} pixels",
        )


def with_overrides(
    req: OmniDiffusionRequest, prompt: Any, negative_prompt: Any, overrides: dict[str, Any]
) -> OmniDiffusionRequest:
    """``req`` with the arguments that a caller of ``forward`` passed beside it.

    Raises:
        RequestError: an argument that is no sampling parameter.
    """
    if overrides:
        OmniDiffusionSamplingParams.from_kwargs(overrides)
        req = replace(req, sampling_params=replace(req.sampling_params, **overrides))
    if prompt is None and negative_prompt is None:
        return req
    texts = req.texts() if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
    negatives: list[str | None] = req.negative_texts() if prompt is None else [None] * len(texts)
    if negative_prompt is not None:
        negatives = [negative_prompt] * len(texts) if isinstance(negative_prompt, str) else list(negative_prompt)
    if len(negatives) != len(texts):
        raise RequestError(f"{len(texts)} prompts but {len(negatives)} negative prompts", field="negative_prompt")
    prompts: list[Any] = [
        text if negative is None else {"prompt": text, "negative_prompt": negative}
        for text, negative in zip(texts, negatives, strict=True)
    ]
    return replace(req, prompts=prompts)
