"""``vllm-omni models``: what is supported, with which features and defaults, from the registry's tables."""

import json
from typing import Annotated, Any

import typer

from vllm_omni.diffusion.registry import ModelFeatures, feature_names, model_defaults, supported_models

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


def models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the supported models with their features and defaults."""
    rows = model_rows()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    typer.echo("\n\n".join(_text(row) for row in rows))


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


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("models")(models)
