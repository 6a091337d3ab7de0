"""NVIDIA's Multi-Process Service (MPS): processes that share a GPU run their kernels on it at the same time.

Processes are clients of a control daemon that they find by ``CUDA_MPS_PIPE_DIRECTORY``; it starts the server that talks
to the GPU when the first one comes. ``MpsDaemon`` is a daemon for one engine, with its pipes and logs in a folder that
goes away with it.

A daemon that was given CUDA_VISIBLE_DEVICES numbers the GPUs anew for its clients, whose own indices would then count
within its list. So it gets that variable only when it names GPUs by UUID; otherwise it offers every GPU, and a
client's CUDA_VISIBLE_DEVICES means what it means without MPS. See NVIDIA's "Multi-Process Service", appendix on
environment variables.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from vllm_omni import envs
from vllm_omni.distributed.runtime_directory import RuntimeDirectory, child_environment
from vllm_omni.errors import ConfigError, DeadlineError, OmniError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

PROGRAM = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
CONTROL = "control"
"""Name of the socket in the folder of pipes at which clients find the daemon."""
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from vllm_omni.distributed.mps_supervisor import main; main(sys.argv[2:])"
)
_MARGIN = 15.0
"""Seconds that the supervisor itself may take beyond the limit of what it waits for."""
_LIST_SECONDS = 30.0
"""Seconds that the list of GPUs may take."""


class MpsDaemon:
    """A control daemon of this process's own; the constructor returns when it takes clients.

    A supervisor (``mps_supervisor``) starts it and ends it, also when this process is killed.

    Args:
        timeout: seconds within which it must be up.

    Raises:
        ConfigError: its program is not on PATH, or it refuses to start; the message ends with its log.
        DeadlineError: it is not up after ``timeout`` seconds; with its log, too.
    """

    def __init__(self, timeout: float) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            raise ConfigError(
                f"gpu_sharing='mps': {PROGRAM} is not on PATH; it comes with NVIDIA's driver (in a container: with "
                "the driver capability 'compute')",
                field="gpu_sharing",
            )
        self._runtime = RuntimeDirectory()
        folders = {PIPES: self._runtime.path / "pipe", LOGS: self._runtime.path / "log"}
        for folder in folders.values():
            folder.mkdir()
        self.env: Mapping[str, str] = {name: str(folder) for name, folder in folders.items()}
        """What a process must have in its environment to be a client."""
        arguments = [json.dumps(sys.path), program, str(self._runtime.path), str(os.getpid()), str(timeout)]
        self._supervisor = subprocess.Popen(
            [sys.executable, "-c", _BOOT, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(self.env, without=() if _named_by_uuid() else ("CUDA_VISIBLE_DEVICES",)),
            process_group=0,
        )
        try:
            self._wait_ready(timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the daemon and its servers, whose clients should have ended; returns when they are gone. Idempotent."""
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        self._supervisor.stdin.close()
        try:
            self._supervisor.wait(2 * _MARGIN)
        except subprocess.TimeoutExpired:
            logger.error("the supervisor of the MPS daemon (pid %d) hangs and is killed", self._supervisor.pid)
            self._supervisor.kill()
            self._supervisor.wait()
        self._supervisor.stdout.close()
        self._runtime.remove()

    def _wait_ready(self, timeout: float) -> None:
        assert self._supervisor.stdout is not None
        ready, _, _ = select.select([self._supervisor.stdout], [], [], timeout + _MARGIN)
        line = self._supervisor.stdout.readline() if ready else b""
        if not line:
            how = "ended" if ready else "does not answer"
            raise ConfigError(f"gpu_sharing='mps': the supervisor of the MPS daemon {how}", field="gpu_sharing")
        answer = json.loads(line)
        if answer["problem"] is not None:
            raise _error(answer["problem"], answer["log"], timeout)


def check_gpu() -> None:
    """Raises:
    ConfigError: this machine has no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides all.
    """
    if envs.CUDA_VISIBLE_DEVICES() == []:
        raise ConfigError(
            "gpu_sharing='mps': there is no GPU to share: CUDA_VISIBLE_DEVICES is empty", field="gpu_sharing"
        )
    tool, why = shutil.which("nvidia-smi"), "nvidia-smi is not on PATH"
    if tool is not None:
        try:
            listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=_LIST_SECONDS)
        except subprocess.TimeoutExpired:
            why = f"nvidia-smi -L takes longer than {_LIST_SECONDS:g} s"
        else:
            if listed.returncode == 0 and listed.stdout.startswith("GPU "):
                return
            why = f"nvidia-smi -L says {(listed.stdout + listed.stderr).strip()!r}"
    raise ConfigError(f"gpu_sharing='mps': there is no NVIDIA GPU to share: {why}", field="gpu_sharing")


def existing_daemon() -> Path | None:
    """Folder of the pipes of a daemon that somebody else started and that every process finds by its environment.

    Raises:
        ConfigError: CUDA_MPS_PIPE_DIRECTORY is set, but no daemon is there: CUDA would go on without one.
    """
    given = envs.CUDA_MPS_PIPE_DIRECTORY()
    if given is None:
        return None
    if not (Path(given) / CONTROL).exists():
        raise ConfigError(
            f"gpu_sharing='mps': there is no MPS daemon in {PIPES}={given}; start it ({PROGRAM} -d), or unset the "
            "variable to have one started",
            field="gpu_sharing",
        )
    return Path(given)


def _named_by_uuid() -> bool:
    visible = envs.CUDA_VISIBLE_DEVICES()
    return visible is not None and not any(name.isdigit() for name in visible)


def _error(problem: str, log: str, timeout: float) -> OmniError:
    tail = f"; its log:\n{log}" if log else "; its log is empty"
    if problem == "late":
        text = f"gpu_sharing='mps': the MPS daemon is not up after {timeout:g} s{tail}"
        return DeadlineError(text, phase="start", field="gpu_sharing")
    return ConfigError(f"gpu_sharing='mps': the MPS daemon does not start ({problem}){tail}", field="gpu_sharing")
