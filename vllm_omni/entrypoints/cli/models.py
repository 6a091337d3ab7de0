"""``vllm-omni models``: what is supported, with which features, stages and defaults, from the package's tables."""

import json
from typing import Annotated, Any

import typer

from vllm_omni.config.stage import load_stage_configs
from vllm_omni.diffusion.registry import ModelFeatures, feature_names, model_defaults, supported_models
from vllm_omni.entrypoints.omni_args import STAGE_CONFIGS
from vllm_omni.model_executor.families import FAMILIES, OmniFamily

DEFAULTS = (
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "height",
    "width",
    "max_sequence_length",
)
"""Fields of a model's ``SamplingDefaults`` that are parameters of a request; the others are limits."""


def model_rows() -> list[dict[str, Any]]:
    """Everything about each model, as plain values; imports no model code."""
    return [_row(name, features) for name, features in supported_models().items()]


def _row(name: str, features: ModelFeatures) -> dict[str, Any]:
    return {
        "class": name,
        "task": features.task,
        "features": {feature: getattr(features, feature) for feature in feature_names()},
        "checkpoints": {
            checkpoint: {
                "defaults": {key: getattr(defaults, key) for key in DEFAULTS if getattr(defaults, key) is not None},
                "size_multiple": defaults.multiple,
                "max_sequence_length": defaults.max_sequence_length_limit,
                "extra_args": sorted(defaults.extra_args),
            }
            for checkpoint, defaults in model_defaults(name).items()
        },
    }


def omni_rows() -> list[dict[str, Any]]:
    """Everything about each family of stages on vLLM, as plain values, from its packaged configurations; imports no
    model code."""
    return [_omni_row(family) for family in FAMILIES]


def _omni_row(family: OmniFamily) -> dict[str, Any]:
    configs = sorted(path.stem for path in STAGE_CONFIGS.glob(f"{family.model_type}*.yaml"))
    stages = load_stage_configs(STAGE_CONFIGS / f"{family.model_type}.yaml").stages
    return {
        "class": family.architecture,
        "task": f"{', '.join(family.reads)} to {', '.join(family.writes)}",
        "reads": list(family.reads),
        "writes": list(family.writes),
        "checkpoints": list(family.checkpoints),
        "stages": [
            {
                "stage_id": stage.stage_id,
                "model_stage": stage.engine_args["model_stage"],
                "stage_type": stage.stage_type,
                "model_arch": stage.engine_args["model_arch"],
                "final_output_type": stage.final_output_type if stage.final_output else None,
                "default_sampling_params": dict(stage.default_sampling_params),
            }
            for stage in stages
        ],
        "stage_configs": configs,
    }


def models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the supported models with their features and defaults."""
    pictures, omni = model_rows(), omni_rows()
    if as_json:
        typer.echo(json.dumps([*pictures, *omni], indent=2))
        return
    typer.echo("\n\n".join([*map(_text, pictures), *map(_omni_text, omni)]))


def _text(row: dict[str, Any]) -> str:
    lines = [f"{row['class']}: {row['task']}"]
    for checkpoint, facts in row["checkpoints"].items():
        lines.append(f"  {checkpoint}")
        lines.append("    defaults  " + ", ".join(f"{key} {value}" for key, value in facts["defaults"].items()))
        limits = [f"height and width multiples of {facts['size_multiple']}"]
        limits.append(f"max_sequence_length up to {facts['max_sequence_length']}")
        lines.append("    limits    " + ", ".join(limits))
        if facts["extra_args"]:
            lines.append("    extra     " + ", ".join(facts["extra_args"]))
    for title, there in (("supports", True), ("refuses", False)):
        names = [name for name, value in row["features"].items() if value is there]
        if names:
            lines.append(f"  {title}  {', '.join(names)}")
    return "\n".join(lines)


def _omni_text(row: dict[str, Any]) -> str:
    lines = [f"{row['class']}: {row['task']}", *(f"  {name}" for name in row["checkpoints"])]
    for stage in row["stages"]:
        out = "" if stage["final_output_type"] is None else f" -> {stage['final_output_type']}"
        lines.append(f"    stage {stage['stage_id']}   {stage['model_stage']} ({stage['stage_type']}){out}")
        defaults = ", ".join(f"{key} {value}" for key, value in stage["default_sampling_params"].items())
        if defaults:
            lines.append(f"    defaults  {defaults}")
    lines.append(f"  stage configurations  {', '.join(row['stage_configs'])}")
    return "\n".join(lines)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("models")(models)
