"""Arguments of ``Omni`` and of the command line, put over those of a stage configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from vllm_omni.config.schema import nearest
from vllm_omni.config.stage import PipelineConfig, StageConfig
from vllm_omni.errors import ConfigError


def runs_on_vllm(stage: StageConfig) -> bool:
    """Whether the stage is an engine of vLLM's and not one of ours."""
    return stage.stage_type != "diffusion" and "engine_cls" not in stage.engine_args


def with_arguments(
    pipeline: PipelineConfig, model: str | None, engine_args: Mapping[str, Any], sources: Mapping[str, str]
) -> PipelineConfig:
    """Put arguments over the file's: ``model`` for all stages that name none, each other one for every stage whose
    engine has it.

    Raises:
        ConfigError: no stage has an argument, or a stage has no model.
    """
    lines, stages = dict(pipeline.sources), []
    takers = _takers(pipeline.stages, engine_args)
    for index, stage in enumerate(pipeline.stages):
        merged = dict(stage.engine_args)
        if model is not None and "model" not in merged:
            merged["model"] = model
            lines[f"stage_args[{index}].engine_args.model"] = sources.get("model", "default")
        elif "model" not in merged and "engine_cls" not in merged:
            raise ConfigError(
                f"stage {stage.stage_id}: model is missing: give one to Omni or to the stage", field="model"
            )
        for name, indices in takers.items():
            if index in indices:
                merged[name] = engine_args[name]
                lines[f"stage_args[{index}].engine_args.{name}"] = sources.get(name, "Omni() argument")
        stages.append(replace(stage, engine_args=merged))
    return replace(pipeline, stages=tuple(stages), sources=lines)


def _takers(stages: Sequence[StageConfig], engine_args: Mapping[str, Any]) -> dict[str, set[int]]:
    """Argument -> places of the stages that get it; one that none knows goes to a diffusion stage, whose error says
    what is near."""
    if not engine_args:
        return {}
    known: dict[int, frozenset[str]] = {}
    diffusion = set()
    for index, stage in enumerate(stages):
        if runs_on_vllm(stage):
            known[index] = _vllm_arguments()
        elif "engine_cls" not in stage.engine_args:
            known[index] = _diffusion_arguments()
            diffusion.add(index)
    out = {}
    for name in engine_args:
        out[name] = {index for index, names in known.items() if name in names} or diffusion
        if not out[name]:
            every = frozenset[str]().union(*known.values())
            hint = nearest(name, every) if every else ""
            raise ConfigError(f"Omni(): {name}: no stage takes it{hint}", field=name)
    return out


def _diffusion_arguments() -> frozenset[str]:
    from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig

    return frozenset(f.name for cls in (OmniDiffusionConfig, DiffusionParallelConfig) for f in fields(cls))


def _vllm_arguments() -> frozenset[str]:
    from vllm_omni.engine.arg_utils import OmniEngineArgs

    return frozenset(f.name for f in fields(OmniEngineArgs))


def overridden(pipeline: PipelineConfig, overrides: Mapping[str, Any], sources: Mapping[str, str]) -> PipelineConfig:
    """Put ``stage_overrides`` over the engine arguments of the stages that it names.

    Raises:
        ConfigError: no such stage, or no names and values.
    """
    stages, lines = list(pipeline.stages), dict(pipeline.sources)
    for index, values in by_stage(pipeline, "stage_overrides", overrides):
        stages[index] = replace(stages[index], engine_args={**stages[index].engine_args, **values})
        source = sources.get("stage_overrides", "default")
        lines.update({f"stage_args[{index}].engine_args.{name}": source for name in values})
    return replace(pipeline, stages=tuple(stages), sources=lines)


def by_stage(
    pipeline: PipelineConfig, field: str, values: Mapping[str, Any]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(place of the stage, names and values) of a setting that is given by stage id.

    Raises:
        ConfigError: no such stage, or no names and values.
    """
    known = {str(stage.stage_id): index for index, stage in enumerate(pipeline.stages)}
    for key, row in values.items():
        if key not in known:
            raise ConfigError(f"{field}: no stage {key!r}; there are {', '.join(known)}", field=field)
        if not isinstance(row, Mapping):
            raise ConfigError(f"{field}: stage {key}: expected names and values, got {row!r}", field=field)
        yield known[key], row
