#!/usr/bin/env python3
"""Write the pages of docs/user_guide/ that are generated from the code. Run by ``make docs``; a test compares them."""

import argparse
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal

from vllm_omni.config.schema import field_docs
from vllm_omni.config.stage import (
    ConnectorConfig,
    EdgeConfig,
    PipelineConfig,
    RuntimeConfig,
    RuntimeDefaults,
    StageConfig,
    StageRuntime,
)
from vllm_omni.diffusion.registry import ModelFeatures
from vllm_omni.entrypoints.cli.bench import BENCH
from vllm_omni.entrypoints.cli.flags import FlagGroup, option_name
from vllm_omni.entrypoints.cli.groups import ENGINE, OMNI, PARALLEL, SAMPLING, SERVE, TEXT
from vllm_omni.entrypoints.cli.models import DEFAULTS, model_rows, omni_rows

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "user_guide"
NOTE = "<!-- Written by tools/generate_docs.py (make docs); do not edit. -->\n\n"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def prose(text: str) -> str:
    """A field's docstring as markdown."""
    return text.replace("``", "`")


def default_of(field: Field[Any]) -> str:
    """A field's default as it is typed in YAML."""
    if field.default is MISSING:
        return "" if field.default_factory is MISSING else "empty"
    value = field.default
    if value is None:
        return ""
    if value == ():
        return "empty"
    return {True: "`true`", False: "`false`"}[value] if isinstance(value, bool) else f"`{value}`"


def kind_of(hint: Any) -> str:
    """A type in words."""
    options = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{option}`" for option in options)
    if typing.get_origin(hint) in (typing.Union, type(int | None)):
        return " or ".join(kind_of(option) for option in options)
    if hint in (int, float, str, bool):
        return {int: "whole number", float: "number", str: "text", bool: "yes/no"}[hint]
    return "list" if typing.get_origin(hint) in (list, tuple, Sequence) else "mapping"


def option_table(group: FlagGroup) -> str:
    """The options of one group."""
    docs, hints = field_docs(group.cls), group.types()
    rows = []
    for field in fields(group.cls):
        if field.name in hints:
            option = option_name(field.name)
            shown = f"`{option}`, `--no-{option[2:]}`" if hints[field.name] is bool else f"`{option}`"
            rows.append((shown, kind_of(hints[field.name]), default_of(field), prose(docs[field.name])))
    return table(("Option", "Value", "Default", "Meaning"), rows)


def cli_options() -> str:
    """Options of the command line."""
    text = "# Options\n\n" + NOTE
    text += (
        "The options that are generated from the fields of dataclasses. The same names are keyword arguments in "
        "Python: sampling parameters of `OmniDiffusionSamplingParams`, the others of `Omni`. A default that is empty "
        "means that the model decides ([Supported models](supported_models.md) lists the models' defaults).\n"
    )
    for group in (SAMPLING, OMNI, ENGINE, PARALLEL, SERVE, TEXT, BENCH):
        text += f"\n## {group.panel}\n\nFields of `{group.cls.__name__}`.\n\n" + option_table(group)
    return text


SECTIONS: tuple[tuple[type, str, str], ...] = (
    (PipelineConfig, "The file", "Top-level keys."),
    (StageConfig, "A stage", "Keys of an entry of `stage_args`."),
    (StageRuntime, "A stage's process", "Keys of `runtime` inside a stage."),
    (RuntimeConfig, "The graph", "Keys of `runtime` on top."),
    (RuntimeDefaults, "Flow control of all edges", "Keys of `runtime.defaults`."),
    (EdgeConfig, "Flow control of one edge", "Keys of an entry of `runtime.edges`."),
    (ConnectorConfig, "A connector", "Keys of an entry of `runtime.connectors`."),
)
YAML_KEYS = {"stages": "stage_args", "from_stage": "from", "to_stage": "to"}
NOT_IN_YAML = ("sources",)


def key_table(cls: type) -> str:
    """The keys of one dataclass of the stage configuration."""
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    rows = []
    for field in fields(cls):
        if field.name not in NOT_IN_YAML:
            needed = field.default is MISSING and field.default_factory is MISSING
            default = "needed" if needed else default_of(field)
            name = YAML_KEYS.get(field.name, field.name)
            rows.append((f"`{name}`", kind_of(hints[field.name]), default, prose(docs[field.name])))
    return table(("Key", "Value", "Default", "Meaning"), rows)


def stage_configuration() -> str:
    """The stage configuration's reference."""
    text = "# Stage configuration\n\n" + NOTE + (Path(__file__).parent / "stage_configuration_head.md").read_text()
    for cls, title, about in SECTIONS:
        text += f"\n## {title}\n\n{about}\n\n" + key_table(cls)
    return text


def supported_models() -> str:
    """Models with their features and defaults."""
    text = "# Supported models\n\n" + NOTE
    text += (
        "`vllm-omni models` prints the same. A checkpoint is a folder in the layout of diffusers (`model_index.json`), "
        "or a hub name that the local cache holds.\n\n## Features\n\n"
    )
    rows = model_rows()
    features = [spec.name for spec in fields(ModelFeatures) if spec.name in rows[0]["features"]]
    docs = field_docs(ModelFeatures)
    head = ("Feature", "Meaning", *(f"`{row['class']}`" for row in rows))
    cells = [
        (f"`{name}`", prose(docs[name]), *("yes" if row["features"][name] else "no" for row in rows))
        for name in features
    ]
    text += table(head, cells) + "\nWhat says no is refused when the engine starts, with an error that names it.\n"
    for row in rows:
        text += f"\n## {row['class']}\n\n{row['task'].capitalize()}.\n\n"
        head = ("Checkpoint", *(f"`{name}`" for name in DEFAULTS), "Sizes", "Most text tokens")
        lines = []
        for checkpoint, facts in row["checkpoints"].items():
            values = (str(facts["defaults"].get(name, "-")) for name in DEFAULTS)
            sizes = f"multiples of {facts['size_multiple']}"
            lines.append((checkpoint, *values, sizes, str(facts["max_sequence_length"])))
        text += table(head, lines)
    return text + omni_models()


def omni_models() -> str:
    """Families of stages on vLLM."""
    text = (
        "\n# Models of several stages\n\nThe checkpoint has `config.json`; its `model_type` picks the stage "
        "configuration that comes with the package. Others are named with `--stage-configs-path`, as are yours "
        "([Stage configuration](stage_configuration.md)).\n"
    )
    for row in omni_rows():
        text += f"\n## {row['class']}\n\n{row['task'].capitalize()}.\n\n"
        text += "".join(f"- {name}\n" for name in row["checkpoints"]) + "\n"
        lines = []
        for stage in row["stages"]:
            defaults = ", ".join(f"`{key}` {value}" for key, value in stage["default_sampling_params"].items())
            out = stage["final_output_type"] or "-"
            lines.append((str(stage["stage_id"]), stage["model_stage"], stage["stage_type"], out, defaults or "-"))
        text += table(("Stage", "Role", "Kind", "Answers with", "Default sampling parameters"), lines)
        text += "\nConfigurations: " + ", ".join(f"`{name}.yaml`" for name in row["stage_configs"]) + ".\n"
    return text


PAGES: dict[str, Callable[[], str]] = {
    "cli_options": cli_options,
    "stage_configuration": stage_configuration,
    "supported_models": supported_models,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", choices=sorted(PAGES), help="print one page instead of writing all")
    args = parser.parse_args()
    if args.print:
        sys.stdout.write(PAGES[args.print]())
        return
    for name, page in PAGES.items():
        (FOLDER / f"{name}.md").write_text(page())
        print(FOLDER / f"{name}.md")


if __name__ == "__main__":
    main()
