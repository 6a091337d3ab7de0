"""What every configuration dataclass shares: field docstrings, unknown-key errors, checked construction.

A configuration is a frozen dataclass whose fields are each followed by a docstring. ``parse`` builds one from plain
values (YAML, keyword arguments, command line) and is the only place where they are checked.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import itertools
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from vllm_omni.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, known: Collection[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name nearest to ``name``, else the list of the known names."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of dataclass ``cls``, inherited fields included, as one line each."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for node, after in itertools.pairwise(body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[node.target.id] = " ".join(str(after.value.value).split())
    return docs


def parse(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build dataclass ``cls`` from plain ``values``; ``where`` (a file and path, "Omni()", a flag) opens messages.

    Raises:
        ConfigError: an unknown key (with the nearest known one) or a value of the wrong type or range.
    """
    known = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, known)}", field=key)
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        own = first.get("ctx", {}).get("error")
        if isinstance(own, ConfigError):  # raised by the dataclass itself: it names its field already
            raise ConfigError(f"{where}: {own.message}", **own.details) from error
        path = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {path}={first.get('input')!r}: {first['msg']}", field=path) from error
