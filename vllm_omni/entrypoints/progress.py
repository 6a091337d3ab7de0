"""The progress bar of ``Omni.generate``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Progress:
    """Steps for one prompt, prompts for several. Shows nothing until there is something to show.

    Args:
        use_tqdm: whether to show a bar; or a function that makes one, called as ``tqdm(total=..., desc=...)``.
        prompts: number of prompts.
    """

    def __init__(self, use_tqdm: bool | Callable[..., Any], prompts: int) -> None:
        self._make = use_tqdm if callable(use_tqdm) else _tqdm if use_tqdm else None
        self._prompts = prompts
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self._make is not None and self._prompts > 1:
            self._bar = self._make(total=self._prompts, desc="Processed prompts")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, stage_id: int, step: int, total: int) -> None:
        """A stage got to ``step`` of ``total``; shown for a single prompt."""
        if self._make is None or self._prompts != 1:
            return
        if self._bar is None:
            self._bar = self._make(total=total, desc="Steps")
        self._bar.update(step - self._bar.n)

    def ended(self, count: int) -> None:
        """So many prompts have ended; shown for several."""
        if self._bar is not None and self._prompts > 1 and count:
            self._bar.update(count)


def _tqdm(**kwargs: Any) -> Any:
    from tqdm import tqdm

    return tqdm(**kwargs)
