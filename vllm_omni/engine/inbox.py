"""The way into a stage: outputs of its sources wait here until there are enough for a call of the edge function.

The driver has an inbox for each stage that it feeds; a stage whose source sends to it straight has its own.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from vllm_omni.errors import OmniError, StageError
from vllm_omni.inputs.edge import EdgeFunction, EdgeInput


class InputRules(Protocol):
    """What holds for the input of a stage, whatever the request."""

    @property
    def process_input(self) -> EdgeFunction:
        """The edge function."""

    @property
    def windows(self) -> Mapping[int, int]:
        """By source: how many of its outputs are handed over together; -1 means all at its end."""

    @property
    def extra(self) -> Mapping[str, Any]:
        """Settings for ``process_input``."""

    @property
    def config(self) -> Any:
        """The checkpoint's configuration, for ``process_input``."""


class Inbox:
    """The stream of chunks into one stage, for one request."""

    __slots__ = ("_carry", "calls", "open_sources", "pending")

    def __init__(self, sources: Iterable[int]) -> None:
        self.pending: dict[int, list[Mapping[str, Any]]] = {source: [] for source in sources}
        self.open_sources = set(self.pending)
        self.calls = 0
        self._carry: dict[str, Any] = {}

    def add(self, source: int, data: Mapping[str, Any], finished: bool, rules: InputRules) -> bool:
        """Take an output; returns whether there is enough for a call now."""
        self.pending[source].append(data)
        if finished:
            self.open_sources.discard(source)
        windows, pending = rules.windows, self.pending
        return all(0 < windows[origin] <= len(pending[origin]) for origin in self.open_sources)

    def call(self, rules: InputRules, key: str, prompt: Any, params: Any) -> Any:
        """Hand over what has come: the prompt of the stage's next chunk, or None."""
        outputs, self.pending = self.pending, {source: [] for source in self.pending}
        last = not self.open_sources
        edge = EdgeInput(key, outputs, prompt, params, self.calls, last, self._carry, rules.extra, rules.config)
        made = rules.process_input(edge)
        self.calls += 1
        return made


def input_error(error: Exception, stage_id: int) -> OmniError:
    """What ``error``, from the way into a stage, is to the request. An edge function is foreign code: what it raises is
    the request's error, and nobody else's. To be called where ``error`` is handled."""
    if isinstance(error, OmniError):
        error.details.setdefault("stage_id", stage_id)
        return error
    text = f"the input function of stage {stage_id} raised {type(error).__name__}: {error}"
    return StageError(text, stage_id=stage_id, cause=traceback.format_exc())
