"""The folder of vLLM's sockets goes away with the process that made it, or with the next one."""

import os
import subprocess
import sys
from pathlib import Path

from vllm.utils.network_utils import get_open_zmq_ipc_path

from vllm_omni.engine.vllm_env import prepare_environment

SCRIPT = """
import os, sys
from pathlib import Path
from vllm_omni.engine.vllm_env import prepare_socket_folder
prepare_socket_folder()
prepare_socket_folder()
path = Path(os.environ["VLLM_RPC_BASE_PATH"], "socket")
path.touch()
print(path, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
"""


def run(tmp_path: Path, how: str, **env: str) -> tuple[int, Path]:
    given = {name: value for name, value in os.environ.items() if name != "VLLM_RPC_BASE_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        env={**given, "TMPDIR": str(tmp_path), **env},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    return done.returncode, Path(done.stdout.split()[-1])


def test_sockets_are_not_left_behind(tmp_path: Path) -> None:
    code, path = run(tmp_path, "killed")
    assert code == -9
    assert path.exists(), "nobody could remove it"
    assert path.parent.parent == tmp_path
    alive = tmp_path / f"vllm-omni-sockets-{os.getpid()}-x"
    alive.mkdir()
    code, path = run(tmp_path, "ended")
    assert code == 0
    assert list(tmp_path.glob("vllm-omni*")) == [alive]
    code, path = run(tmp_path, "ended", VLLM_RPC_BASE_PATH=str(alive))
    assert path.parent == alive, "the folder of the process that started this one"
    assert path.exists()


def test_vllm_makes_its_sockets_there() -> None:
    prepare_environment()
    path = Path(get_open_zmq_ipc_path().removeprefix("ipc://"))
    assert path.parent == Path(os.environ["VLLM_RPC_BASE_PATH"])
    assert path.parent.is_dir()
