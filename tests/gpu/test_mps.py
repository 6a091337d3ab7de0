"""An MPS daemon of our own, with NVIDIA's program: a process that is told of it runs on the GPU through its server."""

import subprocess
import sys

import psutil
import pytest

from vllm_omni.distributed.mps import PROGRAM, MpsDaemon
from vllm_omni.distributed.runtime_directory import child_environment

pytestmark = pytest.mark.gpu

CLIENT = "import torch; print(int(torch.ones(4, device='cuda').sum()), flush=True); input()"


def test_a_process_is_a_client_of_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    daemon = MpsDaemon(30.0)
    try:
        env = child_environment(daemon.env)
        with subprocess.Popen(
            [sys.executable, "-c", CLIENT], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"4\n"
            asked = subprocess.run([PROGRAM], input=b"get_server_list\n", env=env, capture_output=True, timeout=30)
            (server,) = [psutil.Process(int(pid)) for pid in asked.stdout.split()]
            assert server.is_running()
    finally:
        daemon.close()
    assert not server.is_running()
