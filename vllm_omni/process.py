"""What every child process of the package does first: say its name and tie its life to its parent's.

Two nets, because each has a hole: ``PR_SET_PDEATHSIG`` acts at once but only on Linux and only for the thread that made
the child; the lifeline (a pipe whose other end only the parent holds) works everywhere, but needs a thread that runs.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import parent_process, util
from multiprocessing.connection import Connection

import psutil

from vllm_omni.logger import init_logger

logger = init_logger(__name__)

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, however it dies.

    Args:
        parent_pid: the parent's id as the parent knew it, so that a parent that died before this call is noticed.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def die_with_process(pid: int, last: Callable[[], None] | None = None) -> threading.Thread | None:
    """Start a thread that ends this process when process ``pid`` ends, which need not be its parent: for workers that
    another package starts. Does nothing where the kernel cannot tell (other systems than Linux) or for itself.

    Args:
        pid: the process to follow.
        last: called in the thread before this process ends.
    """
    if sys.platform != "linux" or pid in (1, os.getpid()):
        return None
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        select.select([handle], [], [])
        try:
            if last is not None:
                last()
        finally:
            os._exit(1)

    thread = threading.Thread(target=watch, name="lifeline", daemon=True)
    thread.start()
    return thread


def end_in_order() -> None:
    """End this process now, when it is a child that another package started and that is about to end in order, by
    ``SystemExit``. What would come is the interpreter's tear-down of all that is loaded: seconds, and many of them on a
    machine that has other things to do. Returns in any other process.
    """
    error = sys.exception()
    if parent_process() is None or not isinstance(error, SystemExit) or error.code not in (None, 0):
        return
    util._exit_function()  # type: ignore[attr-defined]  # what multiprocessing calls before os._exit: frees semaphores
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def name_process(name: str) -> None:
    """Show ``name`` in ``ps`` and ``top`` (15 characters; Linux only)."""
    if sys.platform == "linux":
        with open("/proc/self/comm", "w") as comm:
            comm.write(name[:15])


def watch_lifeline(lifeline: Connection, on_message: Callable[[bytes], None] | None = None) -> threading.Thread:
    """Start a thread that ends this process when the parent's end of ``lifeline`` closes.

    Args:
        lifeline: the child's end; the parent keeps its end open and sends on it at most small messages.
        on_message: called in the thread with each message; without it a message is ignored.
    """

    def watch() -> None:
        while True:
            try:
                message = lifeline.recv_bytes()
            except (EOFError, OSError):
                os._exit(1)
            if on_message is not None:
                on_message(message)

    thread = threading.Thread(target=watch, name="lifeline", daemon=True)
    thread.start()
    return thread


class WatchedProcess:
    """A process of which somebody wants to know whether it lives, whoever its parent is.

    Args:
        pid: its id; a later process with the same id is told apart from it.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._process: psutil.Process | None = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._process = None

    def is_alive(self) -> bool:
        """Whether it runs; one that has ended and waits for its parent does not."""
        try:
            return (
                self._process is not None
                and self._process.is_running()
                and self._process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            )
        except psutil.NoSuchProcess:
            return False

    def is_stopped(self) -> bool:
        """Whether somebody has frozen it (SIGSTOP, a debugger)."""
        try:
            stopped = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            return self._process is not None and self._process.status() in stopped
        except psutil.NoSuchProcess:
            return False

    def children(self) -> list[int]:
        """Ids of the processes that it and its children have started and that run."""
        try:
            return [] if self._process is None else [child.pid for child in self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """End it by SIGKILL, which acts on a frozen process too."""
        try:
            if self._process is not None:
                self._process.kill()
        except psutil.NoSuchProcess:
            return
