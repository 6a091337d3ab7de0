"""``gpu_sharing="mps"``: a daemon for the engine's stages alone, that no end of the engine leaves behind.

The daemon's program and ``nvidia-smi`` are stand-ins on PATH; stages and supervisor are real processes.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.entrypoints.graphs import chain, stage, write
from vllm_omni.distributed.mps import MpsDaemon
from vllm_omni.distributed.runtime_directory import PREFIX
from vllm_omni.entrypoints.gpu_sharing import gpus_of, share_gpus
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.entrypoints.omni_args import resolve
from vllm_omni.errors import ConfigError, DeadlineError

FAKE = Path(__file__).with_name("fake_mps.py")
ON_ONE_GPU = {"devices": "0"}


@dataclass
class Machine:
    """A machine with a GPU, as far as programs on PATH tell."""

    folder: Path
    runtime: Path
    """Where the folders of engines are."""

    def order(self, word: str) -> None:
        """What the daemon shall do."""
        (self.folder / "orders").write_text(word)

    def starts(self) -> list[dict[str, Any]]:
        """Process and environment of every daemon that was started."""
        did = self.folder / "orders.did"
        return [json.loads(line) for line in did.read_text().splitlines()] if did.exists() else []

    def daemon(self) -> psutil.Process:
        """The daemon, of which there is one and only one."""
        (only,) = self.starts()
        return psutil.Process(only["pid"])

    def left(self) -> list[Path]:
        """Folders of engines."""
        return list(self.runtime.glob(f"{PREFIX}*"))

    def nothing_is_left(self) -> bool:
        """Neither a daemon nor its folder."""
        return not any(psutil.pid_exists(start["pid"]) for start in self.starts()) and not self.left()

    def program(self, name: str, text: str) -> None:
        """Put a program on PATH."""
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    (tmp_path / "bin").mkdir()
    machine = Machine(tmp_path, Path(tempfile.mkdtemp(dir="/tmp")))  # pytest's own path is too long for sockets
    machine.order("work")
    machine.program("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\n")
    machine.program("nvidia-cuda-mps-control", f'#!/bin/sh\nexec {sys.executable} -IS {FAKE} "$@"\n')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # nothing of a real GPU's
    monkeypatch.setenv("FAKE_MPS", str(tmp_path / "orders"))
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(machine.runtime))
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    yield machine
    machine.runtime.rmdir()


def graph(folder: Path, **top: Any) -> str:
    """Two stages on one GPU, and one of which nothing is known."""
    stages = [*chain(2, runtime=ON_ONE_GPU), stage(2, [1], "text")]
    stages[1].pop("final_output"), stages[1].pop("final_output_type")
    return write(folder, stages, **top)


def test_stages_that_share_a_gpu_are_clients_of_one_daemon(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with Omni(stage_configs_path=graph(machine.folder), gpu_sharing="mps") as omni:
        first, second, other = omni.collective_rpc("environment")
        daemon = machine.daemon()
        assert daemon.is_running()
        pipes = Path(first["CUDA_MPS_PIPE_DIRECTORY"])
        assert (pipes / "control").is_socket()
        assert len(os.fsencode(pipes / "control_privileged")) < 108, "as a path of a socket"
        for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
            assert first[name] == second[name] == daemon.environ()[name]
            assert Path(first[name]).parent in machine.left()
            assert name not in other, "it does not say that it uses a GPU"
            assert name not in os.environ, "the driver is no client"
        assert first["CUDA_VISIBLE_DEVICES"] == "3", "stages choose as ever"
        assert "CUDA_VISIBLE_DEVICES" not in daemon.environ(), "the daemon would number its GPUs anew"
        assert any(
            f"[0, 1] are clients of an MPS daemon of their own (CUDA_MPS_PIPE_DIRECTORY={pipes})" in line
            for line in log
        )
        assert not (machine.folder / "orders.quit").exists()
    assert machine.nothing_is_left()
    assert (machine.folder / "orders.quit").exists(), "it was told to quit, not killed"


def test_gpus_named_by_uuid_are_all_that_the_daemon_offers(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0,GPU-1")
    daemon = MpsDaemon(20.0)
    assert machine.daemon().environ()["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"
    daemon.close()
    daemon.close()
    assert machine.nothing_is_left()


def test_a_killed_driver_takes_the_daemon_along(machine: Machine) -> None:
    script = (
        "import sys; from vllm_omni import Omni; "
        "omni = Omni(stage_configs_path=sys.argv[1], gpu_sharing='mps'); print('up', flush=True); input()"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", script, graph(machine.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"up\n"
        below = psutil.Process(driver.pid).children(recursive=True)
        assert machine.daemon() in below, "its supervisor has it"
        assert len(below) == 5, "three stages, the supervisor, the daemon"
        driver.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(below, 20.0)
    assert not alive
    assert machine.nothing_is_left()


def test_a_daemon_that_dies_is_said(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    daemon = MpsDaemon(20.0)
    process = machine.daemon()
    process.kill()
    process.wait(20.0)
    daemon.close()
    assert "the MPS daemon has ended" in capfd.readouterr().err
    assert machine.nothing_is_left()


def test_a_daemon_that_does_not_come_up(machine: Machine) -> None:
    machine.order("hang")
    with pytest.raises(
        DeadlineError, match=r"not up after 0\.5 s; its log:\n(.*\n)*control\.log: no such device"
    ) as caught:
        Omni(stage_configs_path=graph(machine.folder), gpu_sharing="mps", stage_init_timeout=0.5)
    assert caught.value.details["phase"] == "start"
    assert len(machine.starts()) == 1
    assert machine.nothing_is_left()


def test_a_daemon_that_refuses(machine: Machine) -> None:
    machine.order("refuse")
    with pytest.raises(
        ConfigError, match=r"\(code 1\)(.*\n)*start\.log: An instance of this daemon is already running"
    ):
        MpsDaemon(20.0)
    assert machine.nothing_is_left()


def test_a_stage_that_does_not_start_ends_the_daemon(machine: Machine) -> None:
    path = write(machine.folder, chain(2, runtime=ON_ONE_GPU, engine={"refuse": "today"}))
    with pytest.raises(ConfigError, match="refused: today"):
        Omni(stage_configs_path=path, gpu_sharing="mps")
    assert len(machine.starts()) == 1
    assert machine.nothing_is_left()


def test_what_mps_needs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = resolve({"stage_configs_path": graph(machine.folder, runtime={"gpu_sharing": "mps"})})

    def refused(why: str) -> None:
        with pytest.raises(ConfigError, match=why) as caught:
            share_gpus(setup)
        assert caught.value.details["field"] == "gpu_sharing"

    (machine.folder / "bin" / "nvidia-cuda-mps-control").unlink()
    refused("nvidia-cuda-mps-control is not on PATH")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    refused("CUDA_VISIBLE_DEVICES is empty")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    machine.program("nvidia-smi", "#!/bin/sh\necho 'No devices were found'\n")
    refused("no NVIDIA GPU to share: nvidia-smi -L says 'No devices were found'")
    (machine.folder / "bin" / "nvidia-smi").unlink()
    refused("no NVIDIA GPU to share: nvidia-smi is not on PATH")
    assert machine.nothing_is_left()


def test_stages_on_gpus_of_their_own_are_refused(machine: Machine) -> None:
    stages = chain(2, runtime=ON_ONE_GPU)
    stages[1]["runtime"] = {"devices": "1"}
    with pytest.raises(ConfigError, match=r"no two stages share a GPU \(GPU 0: stage 0, GPU 1: stage 1\)"):
        Omni(stage_configs_path=write(machine.folder, stages), gpu_sharing="mps")
    with pytest.raises(ConfigError, match=r"no two stages share a GPU \(none uses one\)"):
        Omni(stage_configs_path=write(machine.folder, chain(2)), gpu_sharing="mps")
    assert not machine.starts()


def test_a_daemon_that_is_there_is_taken(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: list[str]
) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    path = graph(machine.folder)
    with pytest.raises(ConfigError, match=f"no MPS daemon in CUDA_MPS_PIPE_DIRECTORY={tmp_path}"):
        Omni(stage_configs_path=path, gpu_sharing="mps")
    (tmp_path / "control").touch()
    with Omni(stage_configs_path=path, gpu_sharing="mps") as omni:
        assert {env["CUDA_MPS_PIPE_DIRECTORY"] for env in omni.collective_rpc("environment")} == {str(tmp_path)}
    assert any(f"CUDA_MPS_PIPE_DIRECTORY={tmp_path}" in line for line in log)
    assert not machine.starts()


def test_the_argument_wins_over_the_file(machine: Machine) -> None:
    path = graph(machine.folder, runtime={"gpu_sharing": "mps"})
    assert resolve({"stage_configs_path": path}).pipeline.runtime.gpu_sharing == "mps"
    setup = resolve({"stage_configs_path": path, "gpu_sharing": "time_slices"}, {"gpu_sharing": "--gpu-sharing"})
    assert ("runtime.gpu_sharing", "time_slices", "--gpu-sharing") in setup.rows()
    with pytest.raises(ConfigError, match="gpu_sharing='mig'"):
        resolve({"stage_configs_path": path, "gpu_sharing": "mig"})
    with pytest.raises(ConfigError, match=r"stages\.yaml:\d+: runtime: gpu_sharing='no'"):
        resolve({"stage_configs_path": graph(machine.folder, runtime={"gpu_sharing": "no"})})


def test_gpus_of_vllms_stages(machine: Machine) -> None:
    engine = {"model": "m", "tensor_parallel_size": 2}
    row = {"stage_id": 0, "stage_type": "ar", "final_output": True, "engine_args": engine}
    pipeline = resolve({"stage_configs_path": write(machine.folder, [row])}).pipeline
    assert gpus_of(pipeline.stages[0]) == {"0", "1"}
    row["runtime"] = {"devices": "1, 2"}
    pipeline = resolve({"stage_configs_path": write(machine.folder, [row])}).pipeline
    assert gpus_of(pipeline.stages[0]) == {"1", "2"}
