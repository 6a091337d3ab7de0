"""What engines leave under names goes away with them, or with the next launch."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_omni.distributed.runtime_directory import (
    SHARED_MEMORY,
    RuntimeDirectory,
    rendezvous,
    unlink_shared_memory,
)
from vllm_omni.errors import ConfigError

OWNER = """
import sys
from vllm_omni.distributed.runtime_directory import RuntimeDirectory
runtime = RuntimeDirectory()
(runtime.path / "socket").touch()
print(runtime.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the folders of engines, short enough for sockets."""
    folder = Path("/tmp", f"omni-test-{uuid.uuid4().hex[:8]}")
    folder.mkdir()
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(folder))
    yield folder
    folder.rmdir()  # nothing may be left in it


def own() -> tuple[subprocess.Popen[str], Path]:
    """A process that holds a folder, and the folder."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    return owner, Path(owner.stdout.readline().strip())


def end(owner: subprocess.Popen[str], *, kill: bool) -> None:
    if kill:
        owner.kill()
    owner.communicate()


def segment(folder: Path) -> Path:
    """Shared memory as vLLM's ranks on CPU name theirs."""
    path = SHARED_MEMORY / f"{folder.name}-tp:0-[0-1]-cpushm_0"
    path.touch()
    return path


def test_a_killed_owner_is_cleaned_up_after(parent: Path) -> None:
    living, kept = own()
    killed, left = own()
    memory = [segment(kept), segment(left)]
    end(killed, kill=True)
    assert (left / "socket").exists(), "nobody could remove it"
    runtime = RuntimeDirectory()
    assert not left.exists()
    assert (kept / "socket").exists(), "its owner lives"
    assert [path.exists() for path in memory] == [True, False]
    end(living, kill=False)
    assert not kept.exists()
    assert not memory[0].exists()
    runtime.remove()
    runtime.remove()


def test_vllm_makes_its_sockets_there(parent: Path) -> None:
    from vllm.utils.network_utils import get_open_zmq_ipc_path

    runtime = RuntimeDirectory()
    with runtime.entered({"FOR_THE_ENGINE": "1"}):
        path = Path(get_open_zmq_ipc_path().removeprefix("ipc://"))
        assert path.parent == runtime.path
        inherited = subprocess.check_output(
            [sys.executable, "-c", "import os; print(os.environ['VLLM_RPC_BASE_PATH'], os.environ['FOR_THE_ENGINE'])"]
        )
    assert inherited.decode().split() == [str(runtime.path), "1"]
    assert "FOR_THE_ENGINE" not in os.environ
    assert os.environ["VLLM_RPC_BASE_PATH"] == str(parent)
    assert rendezvous(str(runtime.path)) == f"file://{runtime.path}/{runtime.path.name}"
    runtime.remove()


def test_memory_loses_its_name_and_nobody_elses(parent: Path) -> None:
    ours, others = RuntimeDirectory(), RuntimeDirectory()
    memory = [segment(ours.path), segment(others.path)]
    unlink_shared_memory(str(ours.path))
    assert [path.exists() for path in memory] == [False, True]
    ours.remove()
    others.remove()
    assert not memory[1].exists()


def test_what_the_engine_shares_under_other_names(parent: Path) -> None:
    """Named segments of a killed process go with its folder; those that this process has mapped as well do not."""
    script = """
import sys
from multiprocessing import resource_tracker, shared_memory
both = shared_memory.SharedMemory(sys.argv[1])
resource_tracker.unregister(both._name, "shared_memory")
mine = shared_memory.SharedMemory(create=True, size=64)
resource_tracker.unregister(mine._name, "shared_memory")
print(mine.name, flush=True)
sys.stdin.read()
"""
    from multiprocessing.shared_memory import SharedMemory

    both = SharedMemory(create=True, size=64)
    engine = subprocess.Popen(
        [sys.executable, "-c", script, both.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert engine.stdout is not None
    name = engine.stdout.readline().strip()
    runtime = RuntimeDirectory()
    runtime.adopt(engine.pid)
    end(engine, kill=True)
    assert (SHARED_MEMORY / name).exists()
    runtime.remove()
    assert not (SHARED_MEMORY / name).exists()
    assert (SHARED_MEMORY / both.name).exists()
    both.close()
    both.unlink()


def test_where_it_cannot_be(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    for wrong in (long, tmp_path / "missing"):
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(wrong))
        with pytest.raises(ConfigError, match=r"at most 44 characters") as caught:
            RuntimeDirectory()
        assert caught.value.details["field"] == "VLLM_RPC_BASE_PATH"
    monkeypatch.delenv("VLLM_RPC_BASE_PATH")
    monkeypatch.setattr("tempfile.tempdir", str(long))
    runtime = RuntimeDirectory()
    assert runtime.path.parent == Path("/tmp"), "the folder of temporary files is too deep for sockets"
    runtime.remove()
