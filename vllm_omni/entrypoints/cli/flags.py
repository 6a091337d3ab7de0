"""Command-line options generated from dataclasses: a field is one option, its docstring is the help text.

Nothing about a field is written a second time: name, type, choices, default and help come from the dataclass. Every
option defaults to None, which means "not given", so that only what the user typed goes on.
"""

from __future__ import annotations

import importlib
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal

import typer

from vllm_omni.config.schema import field_docs


@dataclass(frozen=True)
class FlagGroup:
    """The options of one dataclass."""

    cls: type
    """Dataclass whose fields become options."""
    panel: str
    """What the options are about; opens each help text's group."""
    skip: Mapping[str, str]
    """Fields that are no option -> why (a value that a command line cannot hold, or an option of its own)."""

    def names(self) -> list[str]:
        """The fields that become options."""
        return [f.name for f in fields(self.cls) if f.init and f.name not in self.skip]

    def types(self) -> dict[str, Any]:
        """Types of the fields that become options; the others may name modules that are not imported at run time."""
        by_name = {f.name: f for f in fields(self.cls)}
        holder = type("Fields", (), {"__annotations__": {name: by_name[name].type for name in self.names()}})
        return typing.get_type_hints(holder, vars(importlib.import_module(self.cls.__module__)))

    def given(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the user typed of this group: field -> value."""
        return {name: values[name] for name in self.names() if values[name] is not None}


def option_name(field_name: str) -> str:
    """``num_inference_steps`` -> ``--num-inference-steps``."""
    return "--" + field_name.replace("_", "-")


def with_flags(function: Callable[..., Any], *groups: FlagGroup) -> Callable[..., Any]:
    """``function`` with one more keyword parameter for every field of ``groups``, for typer to read.

    ``function`` takes its own parameters and ``**flags``; it gets every flag, None where it was not given.

    Raises:
        ValueError: two groups, or a group and the function, have a parameter of the same name.
    """
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    made = [parameter for group in groups for parameter in _parameters(group)]
    names = [parameter.name for parameter in (*own, *made)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"options defined twice: {', '.join(twice)}")

    def command(**values: Any) -> Any:
        return function(**values)

    command.__doc__ = unwrapped(function.__doc__ or "")
    command.__name__ = function.__name__
    command.__signature__ = signature.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *made)}
    return command


def unwrapped(text: str) -> str:
    """A docstring with one line a paragraph, so that the terminal's width decides where lines break."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n"))


def _parameters(group: FlagGroup) -> list[inspect.Parameter]:
    docs = field_docs(group.cls)
    by_name = {f.name: f for f in fields(group.cls)}
    hints = group.types()
    made = []
    for name in group.names():
        kind, parser, shape = _cli_type(hints[name], name)
        text = docs[name].replace("``", "").rstrip(".") + _default_text(by_name[name])
        decl = f"{option_name(name)}/--no-{option_name(name)[2:]}" if kind is bool else option_name(name)
        option = typer.Option(decl, help=text, parser=parser, metavar=shape, rich_help_panel=group.panel)
        annotation: Any = typing.Annotated[kind | None, option]
        made.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return made


def _cli_type(hint: Any, name: str) -> tuple[Any, Callable[[str], Any] | None, str | None]:
    """(type for typer, own parser, placeholder in the help) of a field's type, ``| None`` taken off."""
    options = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and len(options) == 1:
        hint = options[0]
    if hint in (int, float, str, bool) or typing.get_origin(hint) is Literal:
        return hint, None, None
    if typing.get_origin(hint) in (list, Sequence) and typing.get_args(hint) == (float,):
        return list, _numbers, "X,Y,..."
    if typing.get_origin(hint) in (list, Sequence) and typing.get_args(hint) == (str,):
        return list, _names, "A,B,..."
    if typing.get_origin(hint) in (dict, Mapping):
        return dict, _json_object, "JSON"
    raise TypeError(f"no option can be made of field {name!r} of type {hint}; add it to the group's skip table")


def _default_text(field: Field[Any]) -> str:
    if field.default in (MISSING, None, "", ()):
        return "."
    value = field.default
    return f" (default {('no', 'yes')[value] if isinstance(value, bool) else value})."


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected numbers separated by commas") from None


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{text!r}: expected a JSON object")
    return value
