"""One process a rank, started fresh (spawn) and reached over a socket pair that nobody else can open.

Ranks are SPMD: each gets every plan and holds every request. When a unit fails on a rank, the others must not wait for
it in a collective, and all must agree on what happened:

1. The failed rank leaves its process groups before it answers (gloo), which breaks collectives that wait for it: those
   ranks fail too. A GPU rank cannot be called back from a collective; it either drains or is lost.
2. The executor waits for every rank's answer, ``FAILURE_GRACE_S`` at most. One that does not come is a dead stage.
3. If any rank failed, all are told to ``Regroup``; then the first cause is returned as the unit's error. The engine
   drops the states of the unit's requests on all ranks, or tries again when no rank had touched them. So all ranks hold
   the same states at all times.

A rank that dies is seen at once: its end of the socket closes and its sentinel fires, and both are always waited on.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from vllm_omni import pulse
from vllm_omni.diffusion import ipc
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.executor.abstract import DiffusionExecutor, local_ranks
from vllm_omni.diffusion.executor.rank_process import rank_main
from vllm_omni.errors import OmniError, StageDeadError, from_wire
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

FAILURE_GRACE_S = 30.0
"""Seconds that the other ranks have to answer after one has failed."""
STOP_S = 5.0
"""Seconds that ranks have to stop by themselves in ``close``."""


@dataclass
class _Rank:
    rank: int
    process: Any
    connection: Connection
    lifeline: Connection


class _MeetingPoint:
    """A file without a name in which ranks find each other: no port, and nothing to clean up after a crash."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("omni-rendezvous")

    @property
    def init_method(self) -> str:
        return f"file:///proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        os.close(self._fd)


class MultiprocDiffusionExecutor(DiffusionExecutor):
    """Parent of the ranks' processes."""

    def __init__(self, od_config: OmniDiffusionConfig) -> None:
        self._od_config = od_config
        self._ranks: list[_Rank] = []
        self._dead: StageDeadError | None = None
        self._meeting_point = _MeetingPoint()
        self._facts: list[dict[str, Any]] = []
        try:
            for rank, local_rank in enumerate(local_ranks(od_config)):
                self._ranks.append(self._start(rank, local_rank))
            self._facts = [ready.facts for ready in self._gather(timeout=None)]
        except BaseException:
            self.close()
            raise

    def _start(self, rank: int, local_rank: int) -> _Rank:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=True)
        lifeline_theirs, lifeline_ours = context.Pipe(duplex=False)
        meeting_point = self._meeting_point.init_method
        setup = ipc.RankSetup(rank, local_rank, self._od_config, meeting_point, os.getpid(), pulse.path())
        process = context.Process(
            target=rank_main,
            args=(setup, theirs, lifeline_theirs),
            name=f"omni-diffusion-rank{rank}",
            daemon=True,  # so that an interpreter that ends without close() ends them instead of waiting for them
        )
        process.start()
        theirs.close()
        lifeline_theirs.close()
        return _Rank(rank, process, ours, lifeline_ours)

    # ------------------------------------------------------------------------------------------ messages

    def _broadcast(self, message: Any) -> None:
        self.check_health()
        for rank in self._ranks:
            try:
                ipc.send(rank.connection, message)
            except OSError as error:
                raise self._death(rank) from error

    def _gather(self, timeout: float | None, *, failed_is_fatal: bool = True) -> list[Any]:
        """One answer of every rank, in the order of ranks.

        Args:
            timeout: seconds to wait; None waits as long as every rank is alive.
            failed_is_fatal: a rank that answers ``Failed`` is about to exit; its error is raised at once.
        """
        answers: dict[int, Any] = {}
        until = None if timeout is None else time.monotonic() + timeout
        waiting = {rank.connection: rank for rank in self._ranks}
        answered: dict[Any, _Rank] = {}  # by sentinel
        while waiting:
            left = None if until is None else max(0.0, until - time.monotonic())
            ready = wait([*waiting, *answered], left)
            if not ready:
                late = ", ".join(str(rank.rank) for rank in waiting.values())
                raise self._die(StageDeadError(f"rank {late} did not answer in time; the stage is given up"))
            for item in ready:
                if not isinstance(item, Connection):
                    raise self._death(answered[item])
                rank = waiting.pop(item)
                try:
                    answer = answers[rank.rank] = ipc.receive(item)
                except (EOFError, OSError) as error:
                    raise self._death(rank) from error
                if isinstance(answer, ipc.Failed) and failed_is_fatal:
                    raise self._fatal(rank, answer)
                if isinstance(answer, ipc.StepResult) and answer.error is not None:
                    until = min(until or math.inf, time.monotonic() + FAILURE_GRACE_S)
                answered[rank.process.sentinel] = rank
        return [answers[rank.rank] for rank in self._ranks]

    def _fatal(self, rank: _Rank, answer: ipc.Failed) -> OmniError:
        """The error of a rank that gave up; while the stage starts, the error itself, afterwards its death."""
        error = from_wire(answer.error)
        dead = StageDeadError(f"{rank.process.name}: {error.message}", **{**error.details, "rank": rank.rank})
        self._die(dead)
        return dead if self._facts else error

    def _death(self, rank: _Rank) -> StageDeadError:
        rank.process.join(1.0)
        code = rank.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"exited with status {code}"
        return self._die(StageDeadError(f"{rank.process.name} (pid {rank.process.pid}) {how}", rank=rank.rank))

    def _die(self, error: StageDeadError) -> StageDeadError:
        self._dead = error
        return error

    # ------------------------------------------------------------------------------------------ the interface

    def execute(self, plan: ipc.StepPlan) -> ipc.StepResult:
        self._broadcast(plan)
        # A whole request has no bound; a step has that of its collectives.
        answers = self._gather(None if plan.kind == "run" else self._od_config.dist_timeout)
        result: ipc.StepResult = answers[0]
        failed = [answer.error for answer in answers if answer.error is not None]
        if failed:
            self._regroup()
            # The cause before its consequences: a rank that only lost its peer in a collective knows less.
            first = min(failed, key=_consequence)
            # A rank that did the step holds a newer state; encoding and decoding leave nothing behind.
            agreed = plan.kind in ("encode", "decode") or len(failed) == len(answers)
            result.error = replace(first, untouched=agreed and all(error.untouched for error in failed))
            for request_id in plan.request_ids:
                result.outputs.pop(request_id, None)
        return result

    def _regroup(self) -> None:
        if len(self._ranks) == 1:
            return
        meeting_point = _MeetingPoint()
        self._broadcast(ipc.Regroup(meeting_point.init_method))
        self._gather(FAILURE_GRACE_S)
        self._meeting_point.close()
        self._meeting_point = meeting_point

    def collective_rpc(self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        self._broadcast(ipc.Call(method, tuple(args), kwargs or {}))
        answers = self._gather(timeout=None, failed_is_fatal=False)
        for answer in answers:
            if isinstance(answer, ipc.Failed):
                raise from_wire(answer.error)
        return [answer.value for answer in answers]

    def check_health(self) -> None:
        if self._dead is not None:
            raise self._dead
        if not self._ranks:
            raise StageDeadError("the stage is closed")
        for rank in self._ranks:
            if wait([rank.process.sentinel], 0):
                raise self._death(rank)

    def facts(self) -> list[dict[str, Any]]:
        return self._facts

    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks]

    def close(self) -> None:
        ranks, self._ranks = self._ranks, []
        if not ranks:
            return
        if self._dead is None:
            for rank in ranks:
                with contextlib.suppress(OSError):
                    ipc.send(rank.connection, ipc.Stop())
            until = time.monotonic() + STOP_S
            for rank in ranks:
                rank.process.join(max(0.0, until - time.monotonic()))
        for rank in ranks:
            if rank.process.is_alive() and self._dead is None:
                logger.warning("%s did not stop by itself and is killed", rank.process.name)
            rank.process.kill()
        for rank in ranks:
            rank.process.join()
            rank.process.close()
            rank.connection.close()
            rank.lifeline.close()
        self._meeting_point.close()


def _consequence(error: ipc.UnitError) -> int:
    """Rank of an error as the cause of a failed unit, lowest first."""
    if error.out_of_memory or error.error is not None:
        return 0
    return 2 if "Connection closed by peer" in error.message or "Connection reset by peer" in error.message else 1
