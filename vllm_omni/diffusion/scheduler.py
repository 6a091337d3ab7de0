"""Decides what a diffusion engine does next: the step is the unit of work.

Pure logic: no torch, no clock of its own, no processes. The engine asks ``next_unit``, has the ranks do it, and reports
what came of it (``encoded``, ``stepped``, ``finish``). One scheduler belongs to one engine.

Life of a request::

    add -> WAITING -> [encode] -> DENOISING -> [denoise] x steps -> DECODING -> [decode] -> gone
           (or, for pipelines without steps:  WAITING -> [run] -> gone)

Rules, each with the reason:

- Requests of equal bucket (same latent shape and layout) are denoised in one batch, oldest first, up to
  ``max_batch`` requests and ``token_limit`` latent tokens. They join and leave between steps.
- Between buckets, device time is shared evenly (fair queueing by the virtual time of each bucket: the bucket that has
  had the least goes next; a step costs its latent tokens). So a small picture never waits for a big one to end, and a
  big one gets its share of steps while small ones keep coming.
- Waiting requests are encoded oldest first within their shape, and the shapes take turns, so that a small picture is
  not queued behind many big ones. A shape holds at most ``max_batch + 1`` encoded requests: one is ready to join.
- Aging: every ``STEP_AGING``-th denoise unit and every ``ENCODE_AGING``-th encode unit goes to the oldest request
  whatever the shares say. So each request finishes within a bound, even when new shapes never stop coming.
- While a batch is being denoised, at most one encode or decode unit runs between two steps, and the two take turns:
  neither can stall the batch, and neither starves.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

SIDE_BATCH = 4
"""Requests that one encode or decode unit takes at most, so that a batch under way is not held up for long."""
STEP_AGING = 32
ENCODE_AGING = 4
HELD_BATCHES = 8
"""Encoded requests of all shapes together: at most this many full batches (each holds latents and conditioning)."""


class Phase(enum.Enum):
    """Where a request is; the value is how a ``DeadlineError`` names it."""

    WAITING = "queue"
    DENOISING = "denoise"
    DECODING = "decode"


class UnitKind(enum.Enum):
    """What the ranks are asked to do."""

    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"
    RUN = "run"
    """A whole request at once, for pipelines that have only ``forward``."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of work."""

    kind: UnitKind
    request_ids: tuple[str, ...]


@dataclass(slots=True)
class _Entry:
    request_id: str
    order: int
    shape: Hashable
    deadline: float | None
    phase: Phase = Phase.WAITING
    bucket: Hashable = None
    tokens: int = 0
    steps: int = 0
    done: int = 0


class Scheduler:
    """Waiting, running and finished-but-not-decoded requests of one engine, and the choice of the next unit."""

    def __init__(self, max_batch: int, *, by_steps: bool = True, token_limit: float = float("inf")) -> None:
        """
        Args:
            max_batch: requests denoised together at most.
            by_steps: False for pipelines that can only run whole requests.
            token_limit: latent tokens (over all pictures) of one denoise unit at most. A request that alone has more
                still gets a unit of its own: whether it can fit at all is for the engine to decide.
        """
        self.max_batch = max_batch
        self.by_steps = by_steps
        self.token_limit = token_limit
        self.decode_limit = float("inf")
        self._entries: dict[str, _Entry] = {}
        # Requests by phase; a dict is an ordered set, oldest first.
        self._waiting: dict[Hashable, dict[str, _Entry]] = {}
        self._denoising: dict[Hashable, dict[str, _Entry]] = {}
        self._decoding: dict[str, _Entry] = {}
        self._held: dict[Hashable, int] = {}
        self._virtual_time: dict[Hashable, float] = {}
        self._held_total = 0
        self._steps_taken = 0
        self._encodes_taken = 0
        self._solo: set[str] = set()
        self._deadlines = 0
        self._counter = itertools.count()
        self._turn_over = False
        self._last_side = UnitKind.DECODE

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def request_ids(self) -> list[str]:
        """All open requests, oldest first."""
        return list(self._entries)

    def add(self, request_id: str, shape: Hashable = None, deadline: float | None = None) -> None:
        """Queue a request. ``shape``: what is known of its size, to take turns between sizes before encoding."""
        entry = _Entry(request_id, next(self._counter), shape, deadline)
        self._entries[request_id] = entry
        self._waiting.setdefault(shape, {})[request_id] = entry
        self._deadlines += deadline is not None

    def encoded(self, request_id: str, bucket: Hashable, steps: int, tokens: int) -> None:
        """A request was encoded: it joins the batch of ``bucket``; ``tokens``: latent tokens of all its pictures."""
        entry = self._entries[request_id]
        self._leave_phase(entry)
        entry.phase, entry.bucket, entry.steps, entry.tokens = Phase.DENOISING, bucket, steps, tokens
        self._held[entry.shape] = self._held.get(entry.shape, 0) + 1
        self._held_total += 1
        if bucket not in self._denoising:
            # A bucket that was idle must not claim the time it did not use; one that had more than its share, keeps it.
            now = min((self._virtual_time[other] for other in self._denoising), default=0.0)
            self._virtual_time = {
                key: spent for key, spent in self._virtual_time.items() if spent > now or key in self._denoising
            }
            self._virtual_time[bucket] = max(self._virtual_time.get(bucket, 0.0), now)
        self._denoising.setdefault(bucket, {})[request_id] = entry
        if steps == 0:
            self._to_decoding(entry)

    def stepped(self, request_ids: Sequence[str]) -> list[tuple[str, int, int]]:
        """One denoise step of these requests is done; returns (id, steps done, steps in all) of each."""
        progress = []
        entries = [self._entries[request_id] for request_id in request_ids]
        if entries:
            self._virtual_time[entries[0].bucket] += sum(entry.tokens for entry in entries)
        for entry in entries:
            entry.done += 1
            progress.append((entry.request_id, entry.done, entry.steps))
            if entry.done == entry.steps:
                self._to_decoding(entry)
        return progress

    def finish(self, request_id: str) -> None:
        """Forget a request in whatever phase it is (finished, failed or aborted); unknown ids are ignored."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return
        self._leave_phase(entry)
        if entry.phase is not Phase.WAITING:
            self._held_total -= 1
            self._held[entry.shape] -= 1
            if not self._held[entry.shape]:
                del self._held[entry.shape]
        self._solo.discard(request_id)
        self._deadlines -= entry.deadline is not None

    def run_alone(self, request_ids: Iterable[str]) -> None:
        """From now on give each of these requests units of its own: their batch ran out of memory."""
        self._solo.update(request_id for request_id in request_ids if request_id in self._entries)

    def tokens_of(self, request_ids: Iterable[str]) -> int:
        """Latent tokens of encoded requests together."""
        return sum(self._entries[request_id].tokens for request_id in request_ids)

    @property
    def num_waiting(self) -> int:
        """Requests that no unit has taken yet."""
        return len(self._entries) - self._held_total

    def expired(self, now: float) -> list[tuple[str, Phase]]:
        """Requests whose deadline has passed, with the phase they are in."""
        if not self._deadlines:
            return []
        return [
            (entry.request_id, entry.phase)
            for entry in self._entries.values()
            if entry.deadline is not None and entry.deadline <= now
        ]

    def next_unit(self) -> Unit | None:
        """The unit to do now, or None when there is nothing to do."""
        if not self.by_steps:
            return self._pick_waiting(UnitKind.RUN, limit=1)
        runnable = bool(self._denoising)
        if not (runnable and self._turn_over):
            side = self._side_unit()
            if side is not None:
                self._turn_over = True
                return side
        self._turn_over = False
        return self._pick_denoise() if runnable else None

    def _side_unit(self) -> Unit | None:
        """An encode or a decode; when both could go, the one that did not go last time."""
        order = (UnitKind.ENCODE, UnitKind.DECODE)
        if self._last_side is UnitKind.ENCODE:
            order = (UnitKind.DECODE, UnitKind.ENCODE)
        for kind in order:
            unit = self._pick_decode() if kind is UnitKind.DECODE else self._pick_waiting(kind, limit=SIDE_BATCH)
            if unit is not None:
                self._last_side = kind
                return unit
        return None

    def _pick_waiting(self, kind: UnitKind, limit: int) -> Unit | None:
        """The oldest requests of the shape whose turn it is: the one that holds the fewest places."""
        shapes: Iterable[Hashable] = self._waiting
        room = HELD_BATCHES * self.max_batch - self._held_total
        if kind is UnitKind.ENCODE:
            shapes = [shape for shape in shapes if self._held.get(shape, 0) <= self.max_batch] if room > 0 else []
        if not shapes:
            return None
        self._encodes_taken += 1
        oldest_first = self._encodes_taken % ENCODE_AGING == 0

        def rank(shape: Hashable) -> tuple[int, int]:
            oldest = next(iter(self._waiting[shape].values())).order
            return (0 if oldest_first else self._held.get(shape, 0), oldest)

        best = min(shapes, key=rank)
        room = min(room, self.max_batch + 1 - self._held.get(best, 0))
        return Unit(kind, self._take(self._waiting[best], max(1, min(limit, room))))

    def _pick_denoise(self) -> Unit:
        self._steps_taken += 1
        if self._steps_taken % STEP_AGING == 0:
            bucket = min(self._denoising, key=lambda key: next(iter(self._denoising[key].values())).order)
        else:
            bucket = min(self._denoising, key=self._virtual_time.__getitem__)
        chosen: list[str] = []
        tokens = 0
        for entry in self._denoising[bucket].values():
            alone = entry.request_id in self._solo
            full = len(chosen) >= self.max_batch or tokens + entry.tokens > self.token_limit
            if chosen and (full or alone):
                break
            chosen.append(entry.request_id)
            tokens += entry.tokens
            if alone:
                break
        return Unit(UnitKind.DENOISE, tuple(chosen))

    def _pick_decode(self) -> Unit | None:
        if not self._decoding:
            return None
        first = next(iter(self._decoding.values()))
        same = {key: entry for key, entry in self._decoding.items() if entry.bucket == first.bucket}
        room = self.decode_limit // first.tokens if first.tokens else SIDE_BATCH
        return Unit(UnitKind.DECODE, self._take(same, int(max(1, min(SIDE_BATCH, room)))))

    def _take(self, members: dict[str, _Entry], limit: int) -> tuple[str, ...]:
        """The oldest ``limit`` of ``members``, but a request that must run alone alone."""
        ids = list(itertools.islice(members, limit))
        for index, request_id in enumerate(ids):
            if request_id in self._solo:
                return tuple(ids[: max(index, 1)])
        return tuple(ids)

    def _to_decoding(self, entry: _Entry) -> None:
        self._leave_phase(entry)
        entry.phase = Phase.DECODING
        self._decoding[entry.request_id] = entry

    def _leave_phase(self, entry: _Entry) -> None:
        if entry.phase is Phase.DECODING:
            del self._decoding[entry.request_id]
            return
        table = self._waiting if entry.phase is Phase.WAITING else self._denoising
        key = entry.shape if entry.phase is Phase.WAITING else entry.bucket
        members = table[key]
        del members[entry.request_id]
        if not members:
            del table[key]
            if table is self._denoising and not self._denoising:
                self._virtual_time.clear()
