"""Options are generated from dataclasses, completely and with their help."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from vllm_omni.entrypoints.cli.flags import FlagGroup, option_name, with_flags
from vllm_omni.entrypoints.cli.groups import ENGINE, OMNI, PARALLEL, SAMPLING


@dataclass
class Sample:
    count: int | None = None
    """How many."""
    kind: Literal["a", "b"] = "a"
    """Which ``kind``."""
    fast: bool = False
    """Whether to hurry."""
    levels: list[float] | None = None
    """Some numbers in [0, 1]."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Anything else."""
    object: Any = None
    """No option."""


GROUP = FlagGroup(Sample, "Sample", {"object": "cannot be typed"})


def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
    seen: dict[str, Any] = {}

    def command(word: Annotated[str, typer.Argument()], **flags: Any) -> None:
        """Do it."""
        seen.update(GROUP.given(flags), word=word)

    app = typer.Typer(add_completion=False)
    app.command()(with_flags(command, GROUP))
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})
    return result.exit_code, seen, result.output


def test_only_what_was_typed_is_given() -> None:
    assert run("w")[1] == {"word": "w"}


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (("--count", "3"), {"count": 3}),
        (("--kind", "b"), {"kind": "b"}),
        (("--fast",), {"fast": True}),
        (("--no-fast",), {"fast": False}),
        (("--levels", "1,0.5"), {"levels": [1.0, 0.5]}),
        (("--extra", '{"x": [1]}'), {"extra": {"x": [1]}}),
    ],
)
def test_each_type_is_parsed(arguments: tuple[str, ...], given: dict[str, Any]) -> None:
    status, seen, _ = run("w", *arguments)
    assert status == 0
    assert seen == {"word": "w", **given}


@pytest.mark.parametrize(
    "arguments",
    [("--count", "x"), ("--kind", "c"), ("--levels", "1;2"), ("--extra", "{"), ("--extra", "[1]"), ("--object", "1")],
)
def test_wrong_values_are_refused(arguments: tuple[str, ...]) -> None:
    status, _, output = run("w", *arguments)
    assert status == 2
    assert arguments[0] in output


def test_help_comes_from_the_docstrings() -> None:
    text = run("--help")[2]
    assert "Which kind (default a)." in text
    assert "Whether to hurry (default no)." in text
    assert "Some numbers in [0, 1]." in text
    assert "No option" not in text


def test_a_name_cannot_be_defined_twice() -> None:
    with pytest.raises(ValueError, match="defined twice: count"):
        with_flags(lambda **flags: None, GROUP, GROUP)


def test_a_type_without_a_form_must_be_skipped() -> None:
    with pytest.raises(TypeError, match="'object'"):
        with_flags(lambda **flags: None, FlagGroup(Sample, "Sample", {}))


@pytest.mark.parametrize("group", [OMNI, SAMPLING, ENGINE, PARALLEL], ids=lambda group: group.cls.__name__)
def test_every_field_is_an_option_or_skipped_with_a_reason(group: FlagGroup) -> None:
    made = with_flags(lambda **flags: None, group)
    options = set(inspect.signature(made).parameters)
    assert options | set(group.skip) == {f.name for f in fields(group.cls)}
    assert not options & set(group.skip)
    assert all(group.skip.values())
    assert option_name("cfg_parallel_size") == "--cfg-parallel-size"
