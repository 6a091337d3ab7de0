"""The process between a driver and its MPS control daemon: starts the daemon, and ends it when the driver ends.

The daemon detaches itself from whoever starts it, so that neither its parent's death nor a signal to a process group
reaches it. This process has the kernel hand it every orphan below it (PR_SET_CHILD_SUBREAPER), so the daemon and its
servers are always children of it, and none is left when it ends. It ends when its stdin or its driver does.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from vllm_omni.distributed.runtime_directory import remove_folder
from vllm_omni.logger import init_logger
from vllm_omni.process import name_process

logger = init_logger(__name__)

_PR_SET_CHILD_SUBREAPER = 36
_QUIT_SECONDS = 5.0
"""Seconds for the daemon's own ``quit``, which waits for clients."""
_SIGNAL_SECONDS = 2.0
"""Seconds from one signal to the next, harder one."""
_TAIL_LINES = 12


def main(argv: Sequence[str]) -> None:
    """Entry: path of the daemon's program, folder with ``pipe`` and ``log``, the driver's id, seconds to start in.

    Answers by one line of JSON on stdout: ``{"problem": null}`` when the daemon takes clients, or ``{"problem": text,
    "log": text}``.
    """
    program, folder, driver, timeout = argv[0], Path(argv[1]), int(argv[2]), float(argv[3])
    name_process("omni-mps")
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        # stdin alone would not do: a fork of the driver that outlives it holds the other end, too.
        ends = [sys.stdin.fileno(), os.pidfd_open(driver)]
        if os.getppid() == driver:
            _supervise(program, folder, ends, timeout)
    finally:
        _end(program)
        remove_folder(folder)


def _supervise(program: str, folder: Path, ends: list[int], timeout: float) -> None:
    problem = _start(program, folder / "log", ends, timeout)
    if problem is None and not _children():
        problem = "it ended at once"
    if problem is not None:
        _answer({"problem": problem, "log": _tail(folder / "log")})
        return
    _answer({"problem": None})
    while children := _children():
        handles = [os.pidfd_open(child.pid) for child in children]
        ready, _, _ = select.select([*ends, *handles], [], [])
        for handle in handles:
            os.close(handle)
        if set(ready) & set(ends):
            return
    logger.error("the MPS daemon has ended: processes that start CUDA from now on fail; %s", _tail(folder / "log"))
    select.select(ends, [], [])


def _children() -> list[psutil.Process]:
    """The daemon, and what else has been handed to this process; who has ended is buried."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    return psutil.Process().children()


def _start(program: str, logs: Path, ends: list[int], timeout: float) -> str | None:
    """Start the daemon; the program returns when it takes clients. Returns what went wrong."""
    with (logs / "start.log").open("wb") as output:
        process = subprocess.Popen([program, "-d"], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    ready, _, _ = select.select([*ends, os.pidfd_open(process.pid)], [], [], timeout)
    if not ready:
        return "late"
    if set(ready) & set(ends):
        return "the driver has ended"
    code = process.wait()
    return None if code == 0 else f"code {code}"


def _end(program: str) -> None:
    """End everything below this process: by the daemon's own command, then by signals."""
    if _children():
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):
            quiet = subprocess.DEVNULL
            subprocess.run([program], input=b"quit\n", stdout=quiet, stderr=quiet, timeout=_QUIT_SECONDS)
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        left = psutil.Process().children(recursive=True)
        for process in left:
            if number is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        psutil.wait_procs(left, _SIGNAL_SECONDS)


def _answer(values: dict[str, object]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the driver has ended
        os.write(sys.stdout.fileno(), (json.dumps(values) + "\n").encode())


def _tail(logs: Path) -> str:
    """The last lines of every log."""
    parts = []
    for path in sorted(logs.glob("*.log")):
        lines = path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        parts += [f"{path.name}: {line}" for line in lines]
    return "\n".join(parts)
