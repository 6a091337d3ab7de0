"""Progress of ``generate`` on stderr: what is loading, steps with the time left, how many pictures are done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

LABEL_WIDTH = 40
MAX_BARS = 8
"""Requests shown at once; a batch is seldom larger, and a screen not much higher."""


class GenerationProgress:
    """Bars for the requests that are being denoised, and one for all of them when there are several."""

    def __init__(self, total: int, enabled: bool) -> None:
        self._console = Console(file=sys.stderr)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not enabled,
        )
        self._enabled = enabled
        self._running: dict[str, TaskID] = {}
        self._overall = self._bars.add_task("all", total=total, unit="prompts") if total > 1 else None

    @contextmanager
    def loading(self, what: str) -> Iterator[None]:
        """A spinner while ``what`` loads."""
        with Progress(
            SpinnerColumn(), TextColumn(what), console=self._console, transient=True, disable=not self._enabled
        ) as bars:
            bars.add_task("")
            yield

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Show the bars."""
        with self._bars:
            yield

    def step(self, request_id: str, label: str, step: int, total: int) -> None:
        """A request got one step further."""
        task = self._running.get(request_id)
        if task is None:
            if len(self._running) >= MAX_BARS:
                return
            short = label if len(label) <= LABEL_WIDTH else label[: LABEL_WIDTH - 3] + "..."
            task = self._running[request_id] = self._bars.add_task(short.replace("[", r"\["), total=total, unit="steps")
        self._bars.update(task, completed=step)

    def done(self, request_id: str) -> None:
        """A request has ended."""
        task = self._running.pop(request_id, None)
        if task is not None:
            self._bars.remove_task(task)
        if self._overall is not None:
            self._bars.advance(self._overall)

    def say(self, text: str, error: bool = False) -> None:
        """Print a line, above the bars where there are some: results to stdout, errors to stderr."""
        if self._bars.live.is_started and (error or sys.stdout.isatty()):
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr if error else sys.stdout, flush=True)
