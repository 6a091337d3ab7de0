"""The seam between a stage's process and the engine inside it.

The stage process (``engine/stage_process.py``) owns the sockets, decodes requests, and drives one ``StageEngine`` from
its main thread::

    while running:
        take every message that has arrived (block when not engine.has_work())
        -> engine.add_request(...) / engine.abort(...) / ...
        for event in engine.step(): send it to the driver

All methods are called from that one thread, so an engine needs no locks. ``step`` may block for one unit of compute
(one denoise step); everything else returns at once. A request-level failure is a ``StageFailure`` event and never an
exception: an exception out of ``step`` is the engine's death, and every open request gets a ``StageDeadError``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec

from vllm_omni.errors import OmniError

Span: TypeAlias = tuple[str, float, float, dict[str, Any]]
"""Something that was done for a request: its name, begin and end (``time.monotonic()`` seconds), plain facts."""


class StageInput(msgspec.Struct, frozen=True):
    """One request, or one more chunk of it, for a stage."""

    request_id: str
    """Unique among the open requests of the stage."""
    prompt: Any
    """What the edge function (or the user) gave; media and tensors are already local objects."""
    sampling_params: Any
    """Sampling parameters of this stage."""
    deadline: float | None = None
    """``time.monotonic()`` second after which the request is failed with a ``DeadlineError``; one clock per host."""
    chunk: int = 0
    """Number of the chunk; 0 opens the request."""
    last: bool = True
    """Whether no chunk follows. An input that is not streamed is chunk 0 and last."""
    traced: bool = False
    """Whether the outputs should say what was done when."""


@dataclass(frozen=True)
class StageProgress:
    """A request got one step further."""

    request_id: str
    step: int
    total: int


@dataclass(frozen=True)
class StagePreview:
    """What a request is going to become, as far as can be told after ``step`` of ``total`` steps."""

    request_id: str
    step: int
    total: int
    images: Any
    """[B, h, w, 3] uint8, smaller than the pictures themselves."""
    size: tuple[int, int]
    """Width and height of the pictures themselves."""


class StageChunk(msgspec.Struct, frozen=True):
    """Output of a request. ``finished`` marks its last one."""

    request_id: str
    data: dict[str, Any]
    """Named outputs: plain values, tensors, arrays, PIL images. Diffusion: images, latents, metrics, ..."""
    finished: bool = True
    started: float | None = None
    """``time.monotonic()`` second at which work on the request began; None: in the first step after it came."""
    spans: Sequence[Span] = ()
    """What was done for the request since its last output, of requests that are traced."""


@dataclass(frozen=True)
class StageFailure:
    """A request failed; the stage goes on."""

    request_id: str
    error: OmniError


StageEvent = StageProgress | StagePreview | StageChunk | StageFailure


@dataclass(frozen=True)
class StageInfo:
    """What a stage says of itself when it is ready."""

    name: str
    """Model or engine class."""
    ranks: int = 1
    """Processes that share the stage."""
    pids: list[int] = field(default_factory=list)
    """Process ids of its ranks beside the engine process."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain values for logs: device, dtype, bytes of weights, seconds of each start-up phase. ``information`` are the
    keys of a prompt's ``additional_information`` that it reads; missing or None: any."""


class StageEngine(ABC):
    """What a stage process drives. Built by ``cls.from_config(stage_id, engine_args)`` in that process."""

    @classmethod
    @abstractmethod
    def from_config(cls, stage_id: int, engine_args: dict[str, Any]) -> StageEngine:
        """Load everything. Raises ``ConfigError`` for a setting that cannot be honoured."""

    @abstractmethod
    def info(self) -> StageInfo:
        """Facts for the driver, after loading."""

    @abstractmethod
    def add_request(self, request: StageInput) -> None:
        """Queue a request or a further chunk. Bad input becomes a ``StageFailure`` of the next ``step``."""

    @abstractmethod
    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ids are ignored. No event is sent for them afterwards."""

    @abstractmethod
    def has_work(self) -> bool:
        """Whether ``step`` would do something now."""

    @abstractmethod
    def step(self) -> list[StageEvent]:
        """Do one unit of work and return what came of it."""

    def load(self) -> tuple[int, int] | None:
        """Requests that wait in the engine, and requests that it works on; None when it does not tell."""
        return None

    def check_health(self) -> None:
        """Raise ``StageDeadError`` when a rank is gone or hangs."""
        return

    def start_profile(self, folder: str) -> None:
        """Start a torch profiler trace of every rank."""
        raise NotImplementedError

    def stop_profile(self) -> list[str]:
        """Stop the trace; returns the files written."""
        raise NotImplementedError

    def call(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """Call a method of the worker on every rank (worker extensions); one result a rank."""
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Stop ranks and free memory. Idempotent."""
