"""``vllm-omni models``: what is supported, with which features and defaults, from the registry's tables."""

import json
from dataclasses import fields
from typing import Annotated, Any

import typer

from vllm_omni.diffusion.registry import ModelFeatures, feature_names, supported_models

LIMITS = ("max_sequence_length_limit", "multiple", "honoured", "extra_args")
"""Fields of a model's defaults that are limits, not defaults."""


def model_rows() -> list[dict[str, Any]]:
    """Everything about each model, as plain values. Imports the models' code, which takes a moment."""
    return [_row(name, features) for name, features in supported_models().items()]


def _row(name: str, features: ModelFeatures) -> dict[str, Any]:
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.registry import resolve_pipeline_class

    pipeline = resolve_pipeline_class(OmniDiffusionConfig(model=name, model_class_name=name))
    values = {spec.name: getattr(pipeline.defaults, spec.name) for spec in fields(pipeline.defaults)}
    return {
        "class": name,
        "task": features.task,
        "checkpoints": list(features.models),
        "features": {feature: getattr(features, feature) for feature in feature_names()},
        "defaults": {key: value for key, value in values.items() if key not in LIMITS and value is not None},
        "size_multiple": values["multiple"],
        "max_sequence_length": values["max_sequence_length_limit"],
        "extra_args": sorted(values["extra_args"]),
    }


def models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the supported models with their features and defaults."""
    rows = model_rows()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    typer.echo("\n\n".join(_text(row) for row in rows))


def _text(row: dict[str, Any]) -> str:
    features = row["features"]
    lines = [
        ("checkpoints", row["checkpoints"]),
        ("defaults", [f"{key}={value}" for key, value in row["defaults"].items()]),
        ("limits", [f"sizes are multiples of {row['size_multiple']}", f"{row['max_sequence_length']} text tokens"]),
        ("extra args", row["extra_args"]),
        ("supports", [name for name, there in features.items() if there]),
        ("refuses", [name for name, there in features.items() if not there]),
    ]
    body = "".join(f"\n  {title:<12} {', '.join(values)}" for title, values in lines if values)
    return f"{row['class']}: {row['task']}{body}"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("models")(models)
