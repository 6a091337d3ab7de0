"""Prompts of ``generate``: the argument, or a file with one prompt a line.

A line of a ``.jsonl`` file is an object: ``prompt``, and optionally ``negative_prompt``, ``output`` (name of the file
to write) and any sampling parameter, which overrides the flag of the same name for this prompt. A line of any other
file is a prompt. From standard input (``-``) a line that starts with ``{`` is such an object.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vllm_omni.config.schema import nearest
from vllm_omni.entrypoints.cli.groups import SAMPLING
from vllm_omni.errors import RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniTextPrompt

OWN_KEYS = ("prompt", "negative_prompt", "output")


@dataclass(frozen=True)
class PromptRow:
    """One prompt with what its line overrides."""

    line: int
    """Number of the line in the file, from 1."""
    prompt: str
    """The text."""
    negative_prompt: str | None = None
    """What the picture should not show."""
    output: str | None = None
    """Name of the file to write."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters of this prompt alone."""

    def sampling_params(self, flags: Mapping[str, Any]) -> OmniDiffusionSamplingParams:
        """The parameters of the row over those of the command line, checked.

        Raises:
            RequestError: names the field, its value and what is allowed.
        """
        types = SAMPLING.types()
        for name, value in self.overrides.items():
            try:
                TypeAdapter(types[name]).validate_python(value, strict=True)
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                raise RequestError(f"{name}={value!r}: {problem}", field=name, value=repr(value)) from error
        params = OmniDiffusionSamplingParams.from_kwargs({**flags, **self.overrides})
        params.validate()
        return params

    def as_prompt(self) -> str | OmniTextPrompt:
        """The prompt as ``Omni.generate`` takes it."""
        if self.negative_prompt is None:
            return self.prompt
        return OmniTextPrompt(prompt=self.prompt, negative_prompt=self.negative_prompt)


@dataclass(frozen=True)
class BadRow:
    """A line that is no prompt."""

    line: int
    error: RequestError


def read_rows(path: str) -> Iterator[PromptRow | BadRow]:
    """The rows of a file, ``-`` for standard input."""
    known = [*OWN_KEYS, *SAMPLING.names()]
    if path == "-":
        yield from _rows(sys.stdin, None, known)
        return
    with Path(path).open(encoding="utf-8") as stream:
        yield from _rows(stream, Path(path).suffix == ".jsonl", known)


def _rows(lines: Iterable[str], as_json: bool | None, known: list[str]) -> Iterator[PromptRow | BadRow]:
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        if as_json is False or (as_json is None and not text.startswith("{")):
            yield PromptRow(number, text)
            continue
        try:
            yield _from_json(number, text, known)
        except RequestError as error:
            yield BadRow(number, error)


def _from_json(number: int, text: str, known: list[str]) -> PromptRow:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(f"expected an object with the key 'prompt', got {text[:40]!r}")
    for key in values:
        if key not in known:
            raise RequestError(f"unknown key {key!r}{nearest(key, known)}", field=key)
    for key in OWN_KEYS:
        if not isinstance(values.get(key, ""), str):
            raise RequestError(f"{key}={values[key]!r}: expected text", field=key)
    if "prompt" not in values:
        raise RequestError("the key 'prompt' is missing", field="prompt")
    overrides = {key: value for key, value in values.items() if key not in OWN_KEYS}
    return PromptRow(number, values["prompt"], values.get("negative_prompt"), values.get("output"), overrides)
