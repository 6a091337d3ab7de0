"""Checkpoint names to parameter names, as data, and strict loading by it.

A transformer states a ``WeightsMapper``: rules that turn a name of the released checkpoint into one of ours, and say
which part of a stacked parameter (q, k, v of one matrix, the modulation of one block) it is. Loading fails unless every
part of every parameter came and every tensor of the checkpoint had a place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.parameter import BasevLLMParameter

from vllm_omni.errors import ConfigError

ShardId = str | int


@dataclass(frozen=True)
class ComponentSource:
    """Where the weights of one component are, and under which attribute of the pipeline they go."""

    model_or_path: str
    """Folder of the checkpoint, or a hub name."""
    subfolder: str | None
    """Folder of the component in it."""
    revision: str | None
    """Revision of a hub checkpoint."""
    prefix: str = ""
    """What is put before every tensor's name, such as ``transformer.``."""
    fall_back_to_pt: bool = True
    """Whether pickled ``.bin`` files may be read when there are no safetensors."""


@dataclass(frozen=True)
class Rule:
    """One rename: ``pattern`` must match the whole name; ``name`` and ``shard`` are templates with ``\\1`` ..."""

    pattern: str
    name: str
    shard: str | None = None


class WeightsMapper:
    """An ordered table of rules; the first that matches a name decides, a name without a rule stays."""

    def __init__(self, *rules: Rule, shard_ids: Mapping[str, ShardId] | None = None) -> None:
        self._rules = [(re.compile(rule.pattern), rule) for rule in rules]
        self._shard_ids = shard_ids or {}

    def map(self, name: str) -> tuple[str, ShardId | None]:
        """Our name for a checkpoint's ``name`` and the part of the parameter that it is (None: all of it)."""
        for pattern, rule in self._rules:
            match = pattern.fullmatch(name)
            if match:
                shard = match.expand(rule.shard) if rule.shard is not None else None
                return match.expand(rule.name), self._shard_ids.get(shard, shard) if shard is not None else None
        return name, None


def shards_of(param: nn.Parameter) -> tuple[ShardId | None, ...]:
    """The parts that ``param`` is loaded in; ``(None,)`` for one that comes in one piece."""
    shards: tuple[ShardId, ...] | None = vars(param).get("omni_shards")
    return (None,) if shards is None else shards


def load_param(param: nn.Parameter, tensor: torch.Tensor, shard: ShardId | None = None) -> None:
    """Copy ``tensor`` into ``param``, by the parameter's own ``weight_loader`` where it has one (this rank's slice)."""
    # vLLM's layers say by this attribute how they shard.
    loader: Any = param.weight_loader if isinstance(param, BasevLLMParameter) else vars(param).get("weight_loader")
    if loader is None:
        if param.shape != tensor.shape:
            raise ValueError(f"shape {list(tensor.shape)} where {list(param.shape)} belongs")
        param.data.copy_(tensor)
    elif shard is None:
        loader(param, tensor)
    else:
        loader(param, tensor, shard)


def load_strictly(
    module: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], mapper: WeightsMapper, what: str
) -> set[str]:
    """Load ``weights`` into ``module`` through ``mapper``; returns the names of its parameters.

    Raises:
        ConfigError: a tensor without a place, one that does not fit, or a parameter (or a part of one) that did not
            come; the message lists the names.
    """
    params = dict(module.named_parameters())
    wanted = {(name, shard) for name, param in params.items() for shard in shards_of(param)}
    open_parts = set(wanted)
    unexpected: list[str] = []
    for name, tensor in weights:
        part = mapper.map(name)
        if part not in wanted:
            unexpected.append(name)
            continue
        try:
            load_param(params[part[0]], tensor, part[1])
        except (ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"{what}: tensor {name} of shape {list(tensor.shape)} does not fit {part[0]}: {error}", field="model"
            ) from error
        open_parts.discard(part)
    check_complete(what, sorted(f"{n}[{s}]" if s is not None else n for n, s in open_parts), unexpected)
    return set(params)


def check_complete(what: str, missing: list[str], unexpected: list[str]) -> None:
    """Raise a ``ConfigError`` that lists the names unless both lists are empty."""
    if missing or unexpected:
        raise ConfigError(
            f"{what}: the checkpoint does not match the model"
            + (f"; {len(missing)} weights missing: {_some(missing)}" if missing else "")
            + (f"; {len(unexpected)} tensors have no place: {_some(unexpected)}" if unexpected else ""),
            field="model",
        )


def _some(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
