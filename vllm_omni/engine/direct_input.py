"""Chunks that come to a stage straight from its source, past the driver.

The driver says which requests to expect before it submits them to the source, so a chunk of a request that is not known
here, with all read that the driver has written, is of one that has ended: it is dropped, and nothing needs to be kept
of requests that are over.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.distributed.omni_connectors.utils.leaf_ref import resolve
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.engine import messages as m
from vllm_omni.engine.inbox import Inbox
from vllm_omni.engine.notes import TraceNotes
from vllm_omni.engine.stage_engine import StageInput
from vllm_omni.errors import OmniError
from vllm_omni.inputs.edge import EdgeFunction, pass_on


@dataclass(frozen=True)
class EdgeRules:
    """``InputRules`` of a direct edge, whose functions get no checkpoint's configuration."""

    process_input: EdgeFunction
    windows: Mapping[int, int]
    extra: Mapping[str, Any]
    config: None = None


@dataclass(slots=True)
class Stream:
    """The chunks of one request."""

    deadline: float | None
    direct: bool
    """Whether the stage's own outputs go straight on."""
    prompt: Any
    params: Any
    inbox: Inbox
    received: float = 0.0
    """When the first chunk was here."""
    came: float = 0.0
    """When the source sent it."""
    nbytes: int = 0
    sent: int = 0
    """Chunks that the engine got."""
    notes: TraceNotes | None = None
    """Of a request that is traced."""


@dataclass(slots=True)
class DirectInput:
    """The requests of a stage that its source feeds."""

    edge: m.Edge
    codec: Codec
    streams: dict[str, Stream] = field(default_factory=dict)
    rules: EdgeRules = field(init=False)
    as_it_is: bool = field(init=False)
    """Whether each chunk is the stage's input as it came."""

    def __post_init__(self) -> None:
        function: EdgeFunction = pass_on
        if self.edge.function is not None:
            module, _, name = self.edge.function.rpartition(".")
            function = getattr(importlib.import_module(module), name)
        self.rules = EdgeRules(function, {self.edge.source: self.edge.window}, self.edge.extra)
        self.as_it_is = function is pass_on and self.edge.window == 1

    def expect(self, message: m.Expect, buffers: memoryview) -> None:
        """Know a request from now on. Raises ``OmniError`` when its parameters cannot be read."""
        prompt, params = self.codec.unpack(message.payload, buffers)
        inbox = Inbox([self.edge.source])
        notes = TraceNotes() if message.traced else None
        given = message.deadline, message.direct, prompt, params, inbox
        self.streams[message.request_id] = Stream(*given, notes=notes)

    def drop(self, message: m.Output, buffers: memoryview) -> None:
        """Give back the memory of a chunk that nobody waits for."""
        with contextlib.suppress(OmniError):
            self.codec.unpack(message.payload, buffers, lazy=True)

    def take(self, stream: Stream, message: m.Output, buffers: memoryview) -> StageInput | None:
        """What the engine gets now that a chunk has come, if anything.

        Raises:
            OmniError: the chunk cannot be read.
            Exception: the edge function raised.
        """
        if not stream.received:
            stream.received, stream.came = time.monotonic(), message.sent
        stream.nbytes += memoryview(message.payload).nbytes + len(buffers) + message.shared
        key, last = message.request_id, message.finished
        if self.as_it_is:
            prompt = self.codec.unpack(message.payload, buffers)
        else:
            # A function looks at large leaves only where it must.
            data = self.codec.unpack(message.payload, buffers, lazy=True)
            if not stream.inbox.add(self.edge.source, data, last, self.rules):
                return None
            prompt = stream.inbox.call(self.rules, key, stream.prompt, stream.params)
        if last:
            del self.streams[key]
        if prompt is None and not (last and stream.sent):
            return None
        if not self.as_it_is:
            prompt = resolve(prompt, copy=False)
        chunk, stream.sent = stream.sent, stream.sent + 1
        return StageInput(key, prompt, stream.params, stream.deadline, chunk, last, stream.notes is not None)
