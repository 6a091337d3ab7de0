"""Parts of a pipeline that are other libraries' classes: text encoders, tokenizers, VAEs.

They are built empty on the target device in the model's dtype, and their weights go in through the same strict loading
as the transformer's. So nothing is copied by way of the CPU, and ``dummy`` weights work for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.models.common.weights import ShardId, WeightsMapper, load_strictly
from vllm_omni.diffusion.utils.checkpoint import read_config
from vllm_omni.errors import ConfigError


@dataclass(frozen=True)
class Component:
    """A part with weights: the attribute it is kept under, its folder, and how its tensors are called on disk."""

    name: str
    """Attribute of the pipeline and folder of the checkpoint."""
    renames: tuple[tuple[str, str], ...] = ()
    """Prefixes on disk and in the module; released checkpoints and those of newer libraries differ in them."""


class _PrefixMapper(WeightsMapper):
    """Takes a name as it is, or with the first prefix swapped that makes it one of the module's."""

    def __init__(self, module: nn.Module, renames: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._names = {name for name, _ in module.named_parameters()}
        self._renames = renames

    def map(self, name: str) -> tuple[str, ShardId | None]:
        """See ``WeightsMapper.map``."""
        for old, new in (("", ""), *self._renames):
            candidate = new + name.removeprefix(old)
            if name.startswith(old) and candidate in self._names:
                return candidate, None
        return name, None


def load_component(
    module: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], component: Component, owner: str
) -> set[str]:
    """Put ``weights`` into ``module``; returns the names of its parameters.

    Raises:
        ConfigError: lists the names that do not fit.
    """
    mapper = _PrefixMapper(module, component.renames)
    return load_strictly(module, weights, mapper, f"{owner}.{component.name}")


def build_encoder(cls: Any, folder: Path, name: str) -> nn.Module:
    """A transformers model from ``folder/name/config.json``, without weights, on the current device and dtype.

    Raises:
        ConfigError: no such configuration.
    """
    read_config(folder, name, "config.json")
    config = cls.config_class.from_pretrained(folder / name)
    _set_dtype(config, torch.get_default_dtype())
    module: nn.Module = cls(config)
    return module


def _set_dtype(config: Any, dtype: torch.dtype) -> None:
    """Parts of a composite model are built in the dtype of their own configuration, not in torch's default."""
    config.dtype = dtype
    for part in config.sub_configs:
        _set_dtype(getattr(config, part), dtype)


def build_vae(cls: Any, folder: Path, od_config: OmniDiffusionConfig) -> nn.Module:
    """A diffusers VAE from ``folder/vae/config.json``, without weights, with slicing and tiling as configured.

    Raises:
        ConfigError: no such configuration.
    """
    vae: Any = cls.from_config(read_config(folder, "vae", "config.json"))
    if od_config.vae_use_slicing:
        vae.enable_slicing()
    if od_config.vae_use_tiling:
        vae.enable_tiling()
    module: nn.Module = vae
    return module


def load_tokenizer(folder: Path, name: str, od_config: OmniDiffusionConfig) -> Any:
    """The tokenizer in ``folder/name``, of the class that the checkpoint's model_index.json names.

    Raises:
        ConfigError: transformers has no such class, or its files are missing or damaged.
    """
    entry = read_config(folder, "model_index.json").get(name)
    class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else "AutoTokenizer"
    try:
        cls = getattr(transformers, class_name)  # lazy: dir() does not list every class before its first use
    except AttributeError as error:
        raise ConfigError(
            f"model_index.json: tokenizer class {class_name!r} is not in transformers", field="model"
        ) from error
    try:
        return cls.from_pretrained(folder / name, trust_remote_code=od_config.trust_remote_code, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / name}: cannot load the tokenizer: {error}", field="model") from error
