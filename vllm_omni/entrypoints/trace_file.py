"""A trace as a file for Perfetto and Chrome (JSON array of trace events).

Each process of the model is a process of the trace (the driver is 0, stage i is i + 1) and each request a track in it.
Transfers between processes may overlap what a stage does, so they are asynchronous slices beside the track. The file
is written request by request as they end, and a reader of the format takes it without its closing bracket: what was
written stays readable however the program ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vllm_omni.entrypoints.tracing import RequestTrace, Slice
from vllm_omni.errors import ConfigError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)


class TraceFile:
    """Recorder that writes one file.

    Args:
        path: the file; what stands in it is replaced.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._works = True
        self._zero = time.monotonic()
        self._tracks = itertools.count(1)
        self._transfers = itertools.count(1)
        try:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise ConfigError(f"trace={path!r}: cannot be written: {error.strerror}", field="trace") from error
        self._write("[\n", [_named("process_name", 0, 0, f"driver (pid {os.getpid()})")])

    def name_stages(self, names: Mapping[int, str]) -> None:
        """Write what the stages are called."""
        self._write(",\n", (_named("process_name", stage_id + 1, 0, name) for stage_id, name in names.items()))

    def begun(self, trace: RequestTrace) -> None:
        """See ``Recorder``: nothing is written before the request ends."""

    def entered(self, trace: RequestTrace, stage_id: int, at: float) -> Mapping[str, str]:
        """See ``Recorder``."""
        return {}

    def record(self, trace: RequestTrace) -> None:
        """Write a request."""
        self._write(",\n", self._events(trace))

    def close(self) -> None:
        """Write the closing bracket."""
        if not self._file.closed:
            self._write("\n]\n", ())
            with contextlib.suppress(OSError):
                self._file.close()

    def _write(self, before: str, events: Iterable[dict[str, Any]]) -> None:
        if self._file.closed or not self._works:
            return
        lines = ",\n".join(json.dumps(event, separators=(",", ":"), default=str) for event in events)
        try:
            self._file.write(before + lines)
            self._file.flush()
        except OSError as error:
            self._works = False
            logger.error("trace file %s: %s; nothing more is traced", self._path, error)

    def _events(self, trace: RequestTrace) -> Iterator[dict[str, Any]]:
        track = next(self._tracks)
        yield _named("thread_name", 0, track, trace.request_id)
        yield self._slice(Slice("request", trace.opened, trace.ended, trace.facts()), 0, track)
        for stage_id, slices in trace.tree().items():
            yield _named("thread_name", stage_id + 1, track, trace.request_id)
            for part in slices:
                if part.is_transfer:
                    yield from self._transfer(part, stage_id + 1, track)
                else:
                    pid = 0 if part.name == "wait" else stage_id + 1
                    shown = Slice(f"wait for stage {stage_id}", part.begin, part.end) if pid == 0 else part
                    yield from (self._slice(item, pid, track) for item in (shown, *shown.inner))

    def _slice(self, part: Slice, pid: int, track: int) -> dict[str, Any]:
        begin, end = self._microseconds(part.begin), self._microseconds(part.end)
        return {
            **{"name": part.name, "ph": "X", "pid": pid, "tid": track, "ts": begin},
            **{"dur": round(end - begin, 3), "args": dict(part.facts)},
        }

    def _transfer(self, part: Slice, pid: int, track: int) -> Iterator[dict[str, Any]]:
        shared = {"name": part.name, "cat": "transfer", "id": next(self._transfers), "pid": pid, "tid": track}
        yield {**shared, "ph": "b", "ts": self._microseconds(part.begin), "args": dict(part.facts)}
        yield {**shared, "ph": "e", "ts": self._microseconds(part.end)}

    def _microseconds(self, at: float) -> float:
        return round((at - self._zero) * 1e6, 3)


def _named(kind: str, pid: int, track: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": track, "args": {"name": name}}
