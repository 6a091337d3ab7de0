"""``vllm-omni config show``: every setting with where it comes from."""

import json
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any

import typer

from vllm_omni import envs
from vllm_omni.config.stage import Row
from vllm_omni.entrypoints.cli.flags import with_flags
from vllm_omni.entrypoints.cli.groups import OMNI_GROUPS, flag_sources, omni_arguments
from vllm_omni.entrypoints.omni_args import resolve

MAX_VALUE_WIDTH = 60


def show(
    env: Annotated[bool, typer.Option("--env", help="Show the environment variables that are read instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **flags: Any,
) -> None:
    """Show every setting and where it comes from: default, file and line, or option. Nothing is started."""
    if env:
        _show_environment(as_json)
        return
    arguments = omni_arguments(flags)
    rows = resolve(arguments, flag_sources(arguments)).rows()
    if as_json:
        typer.echo(json.dumps([{"key": k, "value": v, "source": s} for k, v, s in rows], default=_plain, indent=2))
    else:
        _print_table([("key", "value", "source"), *((k, _text(v), s) for k, v, s in _sorted(rows))])


def _sorted(rows: Iterable[Row]) -> list[Row]:
    """Rows in their order, but those of one stage's engine together."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[0].partition(".engine_args")[0].partition(".")[0], []).append(row)
    return [row for group in groups.values() for row in group]


def _show_environment(as_json: bool) -> None:
    rows = [(name, _shown(variable), variable.default, variable.help) for name, variable in envs.REGISTRY.items()]
    if as_json:
        names = ("name", "value", "default", "help")
        typer.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows], default=_plain, indent=2))
    else:
        head = ("variable", "value", "default", "meaning")
        _print_table([head, *((n, _text(v), _text(d), h) for n, v, d, h in rows)])


def _shown(variable: envs.EnvVar[object]) -> object:
    value = variable()
    return "(set)" if variable.secret and value is not None else value


def _plain(value: Any) -> Any:
    """What JSON cannot hold, as what it can."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return list(value) if isinstance(value, (tuple, set, frozenset)) else str(value)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=_plain)
    return text if len(text) <= MAX_VALUE_WIDTH else text[: MAX_VALUE_WIDTH - 3] + "..."


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Show settings and where they come from.", no_args_is_help=True)
    group.callback()(lambda: None)
    group.command("show")(with_flags(show, *OMNI_GROUPS))
    app.add_typer(group, name="config")
