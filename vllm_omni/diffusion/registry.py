"""Which models there are, where their code is, and what each supports: plain tables, imported lazily."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from vllm_omni.config.schema import nearest
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.utils.checkpoint import model_class_name, model_folder
from vllm_omni.errors import ConfigError

_DIFFUSION_MODELS: dict[str, tuple[str, str, str]] = {
    # pipeline class: (folder below diffusion/models, module, class)
    "FluxPipeline": ("flux", "pipeline_flux", "FluxPipeline"),
    "QwenImagePipeline": ("qwen_image", "pipeline_qwen_image", "QwenImagePipeline"),
}

_DIFFUSION_POST_PROCESS_FUNCS: dict[str, str] = {
    # pipeline class: function in the pipeline's module
    "FluxPipeline": "get_flux_post_process_func",
    "QwenImagePipeline": "get_qwen_image_post_process_func",
}

_DIFFUSION_PRE_PROCESS_FUNCS: dict[str, str] = {}


@dataclass(frozen=True)
class ModelFeatures:
    """What one model supports. A ``False`` is refused at start with a ``ConfigError``."""

    models: tuple[str, ...]
    """Released checkpoints of the class."""
    task: str
    """What it makes from what."""
    tensor_parallel: bool = True
    """Weight matrices shared by ranks; the number of heads must be divisible."""
    cfg_parallel: bool = True
    """Branches of classifier-free guidance on two ranks."""
    ulysses: bool = False
    """Sequence shared by exchanging heads."""
    ring: bool = False
    """Sequence shared by passing keys and values."""
    pipeline_parallel: bool = False
    """Blocks shared by ranks."""
    data_parallel: bool = False
    """Copies of the stage."""
    step_batching: bool = True
    """Requests of different steps, seeds and scales in one forward."""
    compile: bool = True
    """Regional compilation of the repeated blocks."""
    vae_slicing: bool = True
    """Pictures decoded one by one."""
    vae_tiling: bool = True
    """Pictures decoded in tiles."""


_FEATURES: dict[str, ModelFeatures] = {
    "FluxPipeline": ModelFeatures(
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"), "text to image"
    ),
    "QwenImagePipeline": ModelFeatures(("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"), "text to image"),
}

# Feature -> the field of the parallel configuration that asks for it.
_PARALLEL_FIELDS = {
    "tensor_parallel": "tensor_parallel_size",
    "cfg_parallel": "cfg_parallel_size",
    "ulysses": "ulysses_degree",
    "ring": "ring_degree",
    "pipeline_parallel": "pipeline_parallel_size",
    "data_parallel": "data_parallel_size",
}


def supported_models() -> dict[str, ModelFeatures]:
    """Every pipeline class with what it supports; the command line and the documentation render this."""
    return dict(_FEATURES)


def model_defaults(name: str) -> dict[str, Any]:
    """``SamplingDefaults`` of pipeline class ``name`` by released checkpoint; imports no model code."""
    folder, _, _ = _DIFFUSION_MODELS[name]
    defaults: dict[str, Any] = importlib.import_module(f"vllm_omni.diffusion.models.{folder}.defaults").DEFAULTS
    return {checkpoint: defaults[checkpoint] for checkpoint in _FEATURES[name].models}


def feature_names() -> list[str]:
    """Names of the features in ``ModelFeatures``, in order."""
    return [f.name for f in fields(ModelFeatures) if f.type == "bool"]


def _known_name(od_config: OmniDiffusionConfig) -> str | None:
    """Pipeline class of the stage; None for a checkpoint of an unknown class that a custom pipeline is named for.

    Raises:
        ConfigError: not a known model, and no custom pipeline.
    """
    name = od_config.model_class_name or model_class_name(model_folder(od_config.model, od_config.revision))
    if od_config.custom_pipeline_args and name not in _DIFFUSION_MODELS:
        return None
    return resolve_model_name(od_config)


def resolve_model_name(od_config: OmniDiffusionConfig) -> str:
    """Pipeline class of the stage: ``model_class_name``, else the checkpoint's own.

    Raises:
        ConfigError: not a known model; the message names the nearest and all that are supported.
    """
    name = od_config.model_class_name or model_class_name(model_folder(od_config.model, od_config.revision))
    if name not in _DIFFUSION_MODELS:
        raise ConfigError(
            f"no diffusion model {name!r}{nearest(name, _DIFFUSION_MODELS)}; "
            f"supported are {', '.join(sorted(_DIFFUSION_MODELS))}",
            field="model_class_name",
        )
    return name


def resolve_pipeline_class(od_config: OmniDiffusionConfig) -> Any:
    """The pipeline class of the stage, imported.

    Raises:
        ConfigError: not a known model.
    """
    name = resolve_model_name(od_config)
    return vars(_module(name))[_DIFFUSION_MODELS[name][2]]


def get_diffusion_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any] | None:
    """The model's function from VAE output to pictures, or None when it has none."""
    return _process_func(od_config, _DIFFUSION_POST_PROCESS_FUNCS)


def get_diffusion_pre_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any] | None:
    """The model's function that prepares input media, or None when it has none."""
    return _process_func(od_config, _DIFFUSION_PRE_PROCESS_FUNCS)


def check_features(od_config: OmniDiffusionConfig) -> None:
    """Refuse what the stage's model does not support. Of a model that only a custom pipeline knows, nothing is known.

    Raises:
        ConfigError: names the model, the setting and its value.
    """
    name = _known_name(od_config)
    if name is None:
        return
    features = _FEATURES[name]
    for feature, field_name in _PARALLEL_FIELDS.items():
        value = getattr(od_config.parallel_config, field_name)
        if value > 1 and not getattr(features, feature):
            raise ConfigError(f"{field_name}={value}: {name} does not support {feature}; use 1", field=field_name)
    tp = od_config.parallel_config.tensor_parallel_size
    if tp > 1:
        heads = od_config.tf_model_config["num_attention_heads"]
        if heads % tp:
            allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ConfigError(
                f"tensor_parallel_size={tp}: {name} has {heads} attention heads; allowed are {allowed}",
                field="tensor_parallel_size",
            )
    for setting, feature in (("vae_use_slicing", "vae_slicing"), ("vae_use_tiling", "vae_tiling")):
        if getattr(od_config, setting) and not getattr(features, feature):
            raise ConfigError(f"{setting}=True: {name} does not support {feature}", field=setting)


def _module(name: str) -> Any:
    folder, module, _ = _DIFFUSION_MODELS[name]
    return importlib.import_module(f"vllm_omni.diffusion.models.{folder}.{module}")


def _process_func(od_config: OmniDiffusionConfig, table: dict[str, str]) -> Callable[..., Any] | None:
    name = _known_name(od_config)
    if name is None or name not in table:
        return None
    func: Callable[..., Any] = vars(_module(name))[table[name]](od_config)
    return func
