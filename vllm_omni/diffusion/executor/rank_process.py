"""What a rank's process runs first. Light on purpose: the engine imports it, and needs neither models nor vLLM."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection

from vllm_omni import pulse
from vllm_omni.diffusion import ipc
from vllm_omni.errors import ConfigError
from vllm_omni.process import die_with_parent, name_process, watch_lifeline


def rank_main(setup: ipc.RankSetup, connection: Connection, lifeline: Connection) -> None:
    """Tie the process to its engine, then become the rank's worker.

    Args:
        setup: what to run.
        connection: messages to and from the engine.
        lifeline: closes when the engine's process ends.
    """
    die_with_parent(setup.parent_pid)
    watch_lifeline(lifeline)
    name_process(f"omni-rank{setup.rank}")
    if setup.pulse is not None:
        pulse.start(setup.pulse, slot=1 + setup.rank)
    # Ctrl-C reaches the whole process group; the engine decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        from vllm_omni.diffusion.worker.diffusion_worker import WorkerProc
    except ImportError as error:
        failed = ConfigError(f"rank {setup.rank} cannot be started: {error}; is the package installed completely?")
        ipc.send(connection, ipc.Failed(failed.to_wire()))
        os._exit(1)
    WorkerProc.worker_main(setup, connection)
