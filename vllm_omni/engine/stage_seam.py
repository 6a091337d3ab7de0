"""The orchestrator's view of a stage.

A client lives in the orchestrator's event loop. Calls return at once; what the stage does comes back through
``StageListener``, called from the loop. There are two: ``entrypoints/stage_client.py`` for our own stage processes and
``engine/ar_stage_client.py`` for vLLM's engines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from vllm_omni.engine.messages import Notes
from vllm_omni.engine.stage_engine import Span, StageInfo
from vllm_omni.errors import OmniError, StageDeadError
from vllm_omni.outputs import Preview


class StageOutput(msgspec.Struct, frozen=True):
    """One output of a request in one stage. Large leaves of ``data`` are ``LeafRef``s.

    A struct of msgspec, as the other two that are made for every chunk: a frozen dataclass takes five times as long."""

    request_id: str
    data: dict[str, Any]
    finished: bool
    received: float
    """When the stage's process had the request's first chunk."""
    started: float
    """When the engine began the first step that could take it."""
    sent: float
    """When the stage sent this output."""
    nbytes: int = 0
    """Bytes of ``data``, those in shared memory included."""
    spans: Sequence[Span] = ()
    """What the engine did for it since its last output, of requests that are traced."""
    came: float = 0.0
    """When the source sent the first chunk, where that came to the stage straight from it; else 0."""
    bytes_in: int = 0
    """Bytes that came straight from it so far."""


@dataclass(frozen=True)
class Vitals:
    """Signs of life of a stage."""

    beats: Mapping[str, int]
    """By process: a number that changes as long as it runs."""
    progress: int
    """A number that changes whenever the work gets on."""
    busy: bool
    """Whether there is work."""
    load: tuple[int, int] | None
    """Requests that wait in the stage, and requests at work; None when it does not tell."""


@dataclass(frozen=True, slots=True)
class StageLoad:
    """Numbers of a stage's requests."""

    inside: int
    """In the stage."""
    waiting: int
    """In the driver, for a place in the stage."""
    queued: int
    """In the stage's own queue, as it said last."""
    running: int
    """At work in the stage, as it said last."""


class StageListener(Protocol):
    """Who hears of a stage's events; all calls come from the event loop and must not block."""

    def on_output(self, stage_id: int, output: StageOutput) -> None:
        """An output, in the order in which the stage made them."""

    def on_notes(self, stage_id: int, notes: Notes) -> None:
        """What happened to a traced request past the driver; comes before the outputs and the failure that follow."""

    def on_skipped(self, stage_id: int, request_id: str) -> None:
        """The source has ended, and the edge function, called by the stage itself, asked it for nothing."""

    def on_progress(self, stage_id: int, request_id: str, step: int, total: int) -> None:
        """A request got one step further."""

    def on_preview(self, stage_id: int, request_id: str, preview: Preview) -> None:
        """What a request is going to become; only for requests that ask for previews."""

    def on_failure(self, stage_id: int, request_id: str, error: OmniError) -> None:
        """The stage failed on one request."""

    def on_dead(self, stage_id: int, error: StageDeadError) -> None:
        """The stage is gone; called once."""

    def on_turn_end(self) -> None:
        """All that had come from a stage was handed over: what was written meanwhile can go out."""


class StageClient(ABC):
    """What the orchestrator needs of a stage."""

    stage_id: int
    info: StageInfo

    @property
    def renderer(self) -> Any | None:
        """vLLM's renderer of chats and prompts; None for a stage that reads no text by itself."""
        return None

    @abstractmethod
    async def attach(self, listener: StageListener) -> None:
        """Join the running event loop; events go to ``listener`` from now on."""

    @abstractmethod
    def submit(
        self,
        request_id: str,
        prompt: Any,
        params: Any,
        deadline: float | None,
        chunk: int,
        last: bool,
        read: bool = True,
        trace: Mapping[str, str] | None = None,
        direct: bool = False,
    ) -> int:
        """Send a request or a further chunk of one.

        Args:
            request_id: the request.
            prompt: what the stage works on.
            params: its sampling parameters.
            deadline: ``time.monotonic()`` second.
            chunk: number of the chunk.
            last: whether none follows.
            read: whether another stage reads the outputs.
            trace: None for a request that is not traced; else the headers of the span that it belongs to.
            direct: whether the stage sends its outputs straight to the next, which was told to ``expect`` them.

        Returns:
            Bytes that travel, those in shared memory included.

        Raises:
            RequestError: the prompt or the parameters hold something that cannot travel.
        """

    def expect(
        self, request_id: str, prompt: Any, params: Any, deadline: float | None, direct: bool, traced: bool = False
    ) -> bool:
        """Tell the stage of a request whose chunks will come straight from its source. The source must not hear of the
        request before this returns.

        Args:
            request_id: the request.
            prompt: the user's prompt, for the edge function.
            params: sampling parameters of this stage.
            deadline: ``time.monotonic()`` second.
            direct: as of ``submit``.
            traced: whether the stage writes down when chunks come and go (``StageListener.on_notes``).

        Returns:
            Whether the stage has it. If not, the chunks must go by way of the driver.

        Raises:
            RequestError: the prompt or the parameters hold something that cannot travel.
        """
        raise NotImplementedError  # no direct edge leads to a stage whose client has none

    @abstractmethod
    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ids are ignored."""

    @abstractmethod
    async def call(self, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """Call a method of the engine (``check_health``, ``start_profile``, ``stop_profile``, ``call``)."""

    def flush(self) -> None:
        """Send at once what ``submit`` and ``abort`` have put together, and not only in the next turn of the loop."""
        return

    @abstractmethod
    def vitals(self) -> Vitals | None:
        """Signs of life; None once the stage is dead or the client detached."""

    @abstractmethod
    def give_up(self, error: StageDeadError) -> None:
        """The stage hangs: kill its processes, and tell the listener that it is dead of ``error``."""

    @abstractmethod
    def detach(self) -> None:
        """Leave the event loop; the stage itself goes on."""
