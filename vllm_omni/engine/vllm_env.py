"""Environment that vLLM must find, in the driver and in the engine processes it starts."""

from __future__ import annotations

import os


def prepare_environment() -> None:
    """Set what omni stages need; child processes inherit it. Called before the first vLLM configuration is built.

    - The V1 model runner: the one that the omni runners extend.
    - On CPU, the worker inside its engine process, as on a GPU. vLLM's own default gives every engine a second process.
      ``AsyncMPClient`` does not read the variable, so a stage still has a process of its own.
    - Engine processes are spawned: the driver may have threads.
    - One thread a process unless told otherwise: several engines on few cores spin against each other.
    """
    from vllm.platforms import current_platform

    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if current_platform.is_cpu():
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("OMP_NUM_THREADS", "1")
