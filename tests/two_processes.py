"""Two processes share the suite (pytest-xdist): what each runs, and how they end. Hooks for ``conftest.py``.

Most tests wait for servers and engines to start, so that one process leaves a second core idle.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling
    from xdist.workermanage import WorkerController

SHARED = (
    ("tests/diffusion/models/", "tests/diffusion/test_features_matrix.py"),
    ("tests/entrypoints/openai/",),
    ("tests/model_executor/qwen2_5_omni/",),
    ("tests/model_executor/qwen3_omni/",),
)
"""Files that share servers, engines or checkpoints, by the beginnings of their paths: one process runs a line."""
BYTES = 6 << 30
"""Memory that the tests of one process may need."""
END_S = 60.0
"""Longer than any fixture takes to end what it has started."""
DESELECTED = "deselected"

_workers: list[WorkerController] = []


def has_gpu() -> bool:
    """Whether the driver lists a GPU."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """``-n auto``: two processes where there are two cores and memory for both, else one. A GPU is for one alone."""
    room = len(os.sched_getaffinity(0)) >= 2 and psutil.virtual_memory().total >= 2 * BYTES
    return 2 if room and not has_gpu() else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """A process takes whole files, those that share something together, in the order of a run in one process."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((files[0] for files in SHARED if file.startswith(files)), file)

    config.option.loadscopereorder = False
    return Files(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Ctrl-C is for the first process alone, which passes it on."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.setpgid(0, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodeready(node: WorkerController) -> None:
    """A process has started."""
    _workers.append(node)


def pytest_keyboard_interrupt() -> None:
    """Let the processes end their servers and engines: without this xdist kills them after some seconds."""
    for worker in psutil.Process().children() if _workers else ():
        worker.send_signal(signal.SIGINT)
    for node in _workers:
        with contextlib.suppress(node.channel.TimeoutError, node.channel.RemoteError):
            node.channel.waitclose(END_S)


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """A process counts what it leaves out, for the closing line."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        output = items[0].config.workeroutput  # type: ignore[attr-defined]
        output[DESELECTED] = output.get(DESELECTED, 0) + len(items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController, error: object) -> None:
    """All have left the same tests out: the first one's count is told."""
    if error is None and node is _workers[0] and DESELECTED in node.workeroutput:
        node.config.hook.pytest_deselected(items=[SimpleNamespace() for _ in range(node.workeroutput[DESELECTED])])
