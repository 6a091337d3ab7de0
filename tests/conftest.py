"""What every test has: one thread a process, no network.

GPU tests run only where the driver lists a GPU, browser tests only where there is Chromium.
"""

import os
import shutil
import signal

import pytest

from tests.two_processes import (
    has_gpu,
    pytest_configure,
    pytest_deselected,
    pytest_keyboard_interrupt,
    pytest_testnodedown,
    pytest_testnodeready,
    pytest_xdist_auto_num_workers,
    pytest_xdist_make_scheduler,
)

__all__ = [
    "pytest_configure",
    "pytest_deselected",
    "pytest_keyboard_interrupt",
    "pytest_testnodedown",
    "pytest_testnodeready",
    "pytest_xdist_auto_num_workers",
    "pytest_xdist_make_scheduler",
]

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would every process they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # on a GPU: references are exact float32, not TF32
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _has_browser() -> bool:
    return all(shutil.which(name) is not None for name in ("chromium", "chromedriver"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests out that are marked ``gpu`` or ``browser`` on a machine without one; tests that fork come first.

    Other tests leave threads (Gloo's, OpenMP's) in this process, and a fork may wait for ever for a lock that one of
    them held.
    """
    items.sort(key=lambda item: item.path.name != "test_ar_stage_client.py")
    for name, is_there in (("gpu", has_gpu), ("browser", _has_browser)):
        marked = [item for item in items if item.get_closest_marker(name)]
        if marked and not is_there():
            config.hook.pytest_deselected(items=marked)
            items[:] = [item for item in items if item not in marked]
