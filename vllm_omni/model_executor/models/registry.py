"""Architectures that this package adds to vLLM's model registry.

One row a model. ``ensure_registered`` imports only the modules of the architectures that a stage uses, and registers
classes rather than names, so that vLLM needs no extra process to look at them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm_omni.config.schema import nearest
from vllm_omni.errors import ConfigError


@dataclass(frozen=True)
class OmniModelRow:
    """Where the class of an architecture is, and which configuration it is built from."""

    module: str
    """Full name of the module."""
    cls: str
    """Name of the class in it."""
    whole_config: bool = False
    """Built from the checkpoint's whole configuration (vLLM's own multimodal models), also when the stage names a part
    of it in ``hf_config_name``."""


_MODELS = "vllm_omni.model_executor.models"

_OMNI_MODELS: dict[str, OmniModelRow] = {
    "Qwen2_5OmniThinkerForConditionalGeneration": OmniModelRow(
        f"{_MODELS}.qwen2_5_omni.thinker", "Qwen2_5OmniThinkerStage", whole_config=True
    ),
    "Qwen2_5OmniTalkerForConditionalGeneration": OmniModelRow(
        f"{_MODELS}.qwen2_5_omni.talker", "Qwen2_5OmniTalkerStage"
    ),
    "Qwen2_5OmniToken2WavModel": OmniModelRow(f"{_MODELS}.qwen2_5_omni.token2wav", "Qwen2_5OmniToken2WavModel"),
    "Qwen3OmniThinkerForConditionalGeneration": OmniModelRow(
        f"{_MODELS}.qwen3_omni.thinker", "Qwen3OmniThinkerForConditionalGeneration", whole_config=True
    ),
    "Qwen3OmniTalkerForConditionalGeneration": OmniModelRow(
        f"{_MODELS}.qwen3_omni.talker", "Qwen3OmniTalkerForConditionalGeneration"
    ),
    "Qwen3OmniCode2WavForConditionalGeneration": OmniModelRow(
        f"{_MODELS}.qwen3_omni.code2wav", "Qwen3OmniCode2WavForConditionalGeneration"
    ),
}

_registered: set[str] = set()


def register_omni_model(arch: str, module: str, cls: str, *, whole_config: bool = False) -> None:
    """Add a model from outside the package, in every process that uses it (vLLM's ``vllm.general_plugins`` entry point
    is called in all of them)."""
    _OMNI_MODELS[arch] = OmniModelRow(module, cls, whole_config)
    _registered.discard(arch)


def ensure_registered(architectures: Iterable[str]) -> None:
    """Make vLLM know those of ``architectures`` that this package has; others are vLLM's own."""
    from vllm import ModelRegistry

    for arch in architectures:
        if arch in _OMNI_MODELS and arch not in _registered:
            row = _OMNI_MODELS[arch]
            ModelRegistry.register_model(arch, getattr(importlib.import_module(row.module), row.cls))
            _registered.add(arch)


def is_known(arch: str) -> bool:
    """Whether this package or vLLM has ``arch``."""
    from vllm import ModelRegistry

    return arch in _OMNI_MODELS or arch in ModelRegistry.get_supported_archs()


def model_class(architectures: list[str], model_config: Any) -> type[Any]:
    """Class that vLLM will load."""
    from vllm import ModelRegistry

    found: type[Any] = ModelRegistry.resolve_model_cls(architectures, model_config)[0]
    return found


def config_override(arch: str | None, part: str | None, values: Mapping[str, Any] | None = None) -> Any:
    """``hf_overrides`` of a stage: takes ``part`` of the checkpoint's configuration, names the architecture and sets
    ``values`` on top.

    Returns None when the checkpoint's own configuration is right. The result can be pickled.

    Raises:
        ConfigError: neither this package nor vLLM knows ``arch``.
    """
    if arch is None and part is None:
        return None
    if arch is not None and not is_known(arch):
        raise ConfigError(f"model_arch={arch!r} is not known{nearest(arch, _OMNI_MODELS)}", field="model_arch")
    if arch in _OMNI_MODELS and _OMNI_MODELS[arch].whole_config:
        part = None
    return partial(_select, arch=arch, part=part, values=dict(values or {}))


def _select(config: Any, arch: str | None, part: str | None, values: dict[str, Any]) -> Any:
    if config.model_type.startswith("dummy_"):
        return config  # vLLM asks with a bare configuration first, whether the model type will change
    if part is not None:
        parts = {name for name in vars(config) if name.endswith("_config")}
        if part not in parts:
            raise ConfigError(f"hf_config_name={part!r}: {nearest(part, parts)[2:]}", field="hf_config_name")
        config = getattr(config, part)
    if arch is not None:
        config.architectures = [arch]
    config.update(values)
    return config
