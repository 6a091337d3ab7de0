"""Environment that vLLM must find, in the driver and in the engine processes it starts."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import psutil

_SOCKETS = "vllm-omni-sockets-"


def prepare_environment() -> None:
    """Set what omni stages need; child processes inherit it. Called before the first vLLM configuration is built.

    - The V1 model runner: the one that the omni runners extend.
    - On CPU, the worker inside its engine process, as on a GPU. vLLM's own default gives every engine a second process.
      ``AsyncMPClient`` does not read the variable, so a stage still has a process of its own.
    - Engine processes are spawned: the driver may have threads.
    - One thread a process unless told otherwise: several engines on few cores spin against each other.
    - A folder of this process's own for vLLM's sockets: nobody removes the files of those when they are closed.
    """
    from vllm.platforms import current_platform

    prepare_socket_folder()
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if current_platform.is_cpu():
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def prepare_socket_folder() -> None:
    """Have vLLM make its sockets in a folder that is removed at the end of this process, or by a later one."""
    given = os.environ.get("VLLM_RPC_BASE_PATH")
    if given is not None and os.path.isdir(given):  # the user's, or that of the process that started this one
        return
    parent = Path(tempfile.gettempdir())
    for folder in parent.glob(f"{_SOCKETS}*"):  # of drivers that were killed
        pid = folder.name.removeprefix(_SOCKETS).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_SOCKETS}{os.getpid()}-", dir=parent))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["VLLM_RPC_BASE_PATH"] = str(folder)
