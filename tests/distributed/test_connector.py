"""Connectors: what is put in one process is got in another, and freed whoever dies."""

import gc
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.entrypoints.graphs import ask, stage, write
from vllm_omni.config.stage import ConnectorConfig
from vllm_omni.distributed.omni_connectors import OmniConnectorBase, OmniConnectorFactory, SharedMemoryConnector
from vllm_omni.distributed.omni_connectors.factory import stage_threshold
from vllm_omni.distributed.omni_connectors.utils.arena import Arena
from vllm_omni.errors import ConfigError, ConnectorError


@pytest.fixture
def connector() -> Iterator[SharedMemoryConnector]:
    """One connector of this process."""
    made = SharedMemoryConnector(shm_threshold_bytes=1000)
    yield made
    made.close()


def consumer(pipe: Connection) -> None:
    """Another process: gets what it is told to, answers with a sum, holds on to what it got."""
    held = []
    with SharedMemoryConnector(1000) as connector:
        while (order := pipe.recv()) is not None:
            metadata, keep = order
            found = connector.get("0", "1", "key", metadata)
            assert found is not None
            total = int(found[0]["t"].sum())
            if keep:
                held.append(found[0])
            del found
            pipe.send((total, connector.health()["mapped"]))


@pytest.fixture(scope="module")
def other() -> Iterator[Connection]:
    """The pipe to a consumer process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=consumer, args=(theirs,), daemon=True)
    process.start()
    yield ours
    ours.send(None)
    process.join(10)
    assert process.exitcode == 0


def busy(connector: SharedMemoryConnector) -> int:
    connector._arena.reap()
    return int(connector.health()["busy"])


def test_put_and_get_across_processes(connector: SharedMemoryConnector, other: Connection) -> None:
    for size in (10, 10_000, 3_000_000):
        ok, nbytes, metadata = connector.put("0", "1", "r/0", {"t": torch.ones(size, dtype=torch.int32)})
        assert ok
        assert nbytes >= 4 * size
        assert metadata is not None
        assert len(metadata["payload"]) < 1500, "what is large does not travel in the message"
        other.send((metadata, False))
        assert other.recv()[0] == size
    assert busy(connector) == 0


def test_a_segment_is_used_again_once_it_was_consumed(connector: SharedMemoryConnector, other: Connection) -> None:
    mapped = set()
    for i in range(20):
        _, _, metadata = connector.put("0", "1", f"r/{i}", {"t": torch.full((100_000,), i, dtype=torch.int64)})
        other.send((metadata, False))
        total, count = other.recv()
        assert total == i * 100_000
        mapped.add(count)
    assert connector.health()["busy"] + connector.health()["pooled"] <= 2
    assert max(mapped) - min(mapped) <= 1, "the consumer maps nothing new"


def test_what_is_held_is_not_overwritten(connector: SharedMemoryConnector) -> None:
    reader = SharedMemoryConnector(1000)
    held = []
    for i in range(5):
        _, _, metadata = connector.put("0", "1", f"r/{i}", {"a": np.full(10_000, i)})
        found = reader.get("0", "1", f"r/{i}", metadata)
        assert found is not None
        held.append(found[0]["a"][::2])
    del found
    gc.collect()
    assert [int(array[7]) for array in held] == [0, 1, 2, 3, 4]
    assert busy(connector) == 5
    held.clear()
    gc.collect()
    assert busy(connector) == 0
    reader.close()


def test_a_payload_is_fetched_once(connector: SharedMemoryConnector) -> None:
    _, _, metadata = connector.put("0", "1", "r", {"a": np.zeros(10_000)})
    assert connector.get("0", "1", "r", metadata) is not None
    gc.collect()
    with pytest.raises(ConnectorError, match="already consumed"):
        connector.get("0", "1", "r", metadata)
    assert connector.get("0", "1", "nothing") is None
    connector.put("0", "1", "small", {"a": 1})
    assert connector.get("0", "1", "small") == ({"a": 1}, 8)
    assert connector.get("0", "1", "small") is None


def test_cleanup_frees_what_nobody_fetched(connector: SharedMemoryConnector) -> None:
    for key in ("r1", "r1/0", "r1/1", "r10", "r10/0"):
        connector.put("0", "1", key, {"a": np.zeros(10_000)})
    assert busy(connector) == 5
    connector.cleanup("r1")
    connector.cleanup("r1")
    connector.cleanup("unknown")
    assert busy(connector) == 2
    assert connector.health()["stored"] == 2


def test_cleanup_spares_what_was_fetched(connector: SharedMemoryConnector) -> None:
    _, _, metadata = connector.put("0", "1", "r", {"a": np.ones(10_000)})
    reader = SharedMemoryConnector(1000)
    found = reader.get("0", "1", "r", metadata)
    assert found is not None
    connector.cleanup("r")
    connector.put("0", "1", "s", {"a": np.zeros(10_000)})
    assert found[0]["a"].sum() == 10_000
    reader.close()


def test_putting_again_under_a_key_replaces(connector: SharedMemoryConnector) -> None:
    for i in range(5):
        connector.put("0", "1", "r", {"a": np.full(10_000, i)})
    assert busy(connector) == 1
    found = connector.get("0", "1", "r")
    assert found is not None
    assert found[0]["a"][0] == 4


def test_consumed_puts_are_forgotten(connector: SharedMemoryConnector) -> None:
    reader = SharedMemoryConnector(1000)
    for i in range(2500):
        _, _, metadata = connector.put("0", "1", f"r{i}", {"a": np.zeros(300), "i": i})
        reader.get("0", "1", f"r{i}", metadata)
    assert connector.health()["stored"] <= 1025
    assert connector.health()["busy"] + connector.health()["pooled"] <= 40
    reader.close()


CHILD = """
import os, sys, numpy as np
from vllm_omni.distributed.omni_connectors import SharedMemoryConnector
connector = SharedMemoryConnector(1000)
if sys.argv[1] == "make":
    _, _, metadata = connector.put("0", "1", "r", {"a": np.ones(500_000)})
    sys.stdout.buffer.write(metadata["payload"])
    sys.stdout.buffer.flush()
    sys.stdin.read(1)
else:
    found = connector.get("0", "1", "r", {"payload": sys.stdin.buffer.read(int(sys.argv[2])), "size": 0})
    print(found[0]["a"].sum(), flush=True)
    sys.stdin.read(1)
os._exit(0)
"""


def start_child(*args: str) -> "subprocess.Popen[bytes]":
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *args],
        env={**os.environ, "PYTHONPATH": root},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def end_child(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.wait()
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    child.stdout.close()


def test_death_of_the_producer(connector: SharedMemoryConnector) -> None:
    before = set(os.listdir("/dev/shm"))
    child = start_child("make")
    assert child.stdout is not None
    payload = os.read(child.stdout.fileno(), 10_000)
    metadata: dict[str, Any] = {"payload": payload, "size": 0}
    found = connector.get("0", "1", "r", metadata)
    assert found is not None
    end_child(child)
    assert found[0]["a"].sum() == 500_000, "what was fetched stays valid"
    pids = {child.pid}
    child = start_child("make")
    pids.add(child.pid)
    assert child.stdout is not None
    metadata = {"payload": os.read(child.stdout.fileno(), 10_000), "size": 0}
    end_child(child)
    with pytest.raises(ConnectorError, match=f"the process {child.pid} that made the payload is gone"):
        connector.get("0", "1", "r", metadata)
    left = set(os.listdir("/dev/shm")) - before
    assert not {name for name in left if "omni" in name and any(str(pid) in name for pid in pids)}


def test_death_of_the_consumer(connector: SharedMemoryConnector) -> None:
    _, _, metadata = connector.put("0", "1", "r", {"a": np.ones(500_000)})
    assert metadata is not None
    child = start_child("take", str(len(metadata["payload"])))
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(metadata["payload"])
    child.stdin.flush()
    assert child.stdout.readline() == b"500000.0\n"
    assert busy(connector) == 1
    end_child(child)
    assert busy(connector) == 0


def test_the_pool_has_a_limit() -> None:
    open_files = psutil.Process().num_fds()
    arena = Arena(pool_bytes=300_000)
    refs = [arena.write(60_000, lambda view: None) for _ in range(10)]
    assert arena.stats()["bytes"] == 10 * 65536
    for ref in refs:
        arena.release(ref)
    arena.reap()
    assert arena.stats()["bytes"] <= 300_000
    arena.close()
    del refs
    gc.collect()
    assert psutil.Process().num_fds() == open_files
    with pytest.raises(ConnectorError, match="closed"):
        arena.write(10, lambda view: None)


def test_health_and_close() -> None:
    connector = SharedMemoryConnector()
    connector.put("0", "1", "r", np.zeros(100_000))
    health = connector.health()
    assert (health["status"], health["stored"], health["busy"]) == ("healthy", 1, 1)
    connector.close()
    connector.close()
    assert connector.health()["bytes"] == 0


def test_threshold_decides_what_goes_to_shared_memory() -> None:
    for threshold, shared in ((1000, 1), (100_000, 0)):
        with SharedMemoryConnector(threshold) as connector:
            connector.put("0", "1", "r", {"a": np.zeros(5000, np.uint8), "b": 1})
            assert connector.health()["busy"] == shared
    with pytest.raises(ConfigError, match="shm_threshold_bytes=-1"):
        SharedMemoryConnector(-1)


def test_factory() -> None:
    assert "SharedMemoryConnector" in OmniConnectorFactory.list_registered_connectors()
    made = OmniConnectorFactory.create_connector({"name": "SharedMemoryConnector", "extra": {"shm_threshold_bytes": 5}})
    assert isinstance(made, SharedMemoryConnector)
    made.close()
    with pytest.raises(ConfigError, match=r"no connector 'MooncakeConnector'; there are .*SharedMemoryConnector"):
        OmniConnectorFactory.create_connector({"name": "MooncakeConnector"})
    with pytest.raises(ConfigError, match="did you mean 'shm_threshold_bytes'"):
        OmniConnectorFactory.create_connector({"name": "SharedMemoryConnector", "extra": {"shm_treshold_bytes": 5}})


class OwnConnector(SharedMemoryConnector):
    """A connector from outside the package."""


def test_a_connector_of_ones_own() -> None:
    OmniConnectorFactory.register_connector("OwnConnector", OwnConnector)
    with OmniConnectorFactory.create_connector(ConnectorConfig(name="OwnConnector")) as made:
        assert isinstance(made, OmniConnectorBase)
    with pytest.raises(ConfigError, match="registered already"):
        OmniConnectorFactory.register_connector("OwnConnector", OwnConnector)
    with pytest.raises(ConfigError, match="stage 3: connector OwnConnector cannot carry"):
        stage_threshold(3, [ConnectorConfig(name="OwnConnector")], 1)


def test_threshold_of_a_stage() -> None:
    def config(threshold: int) -> ConnectorConfig:
        return ConnectorConfig(extra={"shm_threshold_bytes": threshold})

    assert stage_threshold(0, [], 7) == 7
    assert stage_threshold(0, [ConnectorConfig()], 7) == 7
    assert stage_threshold(0, [config(5), config(5)], 7) == 5
    with pytest.raises(ConfigError, match=r"different shm_threshold_bytes \[5, 6\]"):
        stage_threshold(0, [config(5), config(6)], 7)
    with pytest.raises(ConfigError, match="no connector 'MooncakeConnector'"):
        stage_threshold(0, [ConnectorConfig(name="MooncakeConnector")], 7)


def test_large_images_pass_the_driver_by(tmp_path: Path) -> None:
    from PIL import Image

    from vllm_omni import Omni

    seen = tmp_path / "seen"
    stages = [
        stage(0),
        stage(1, [0], custom_process_input_func="tests.distributed.test_connector.note_kind"),
        stage(2, [1], "image"),
    ]
    image = Image.effect_noise((300, 200), 50).convert("RGB")
    with Omni(stage_configs_path=write(tmp_path, stages), shm_threshold_bytes=1000) as omni:
        for _ in range(3):
            (output,) = omni.generate(ask(image=image, seen=str(seen)), use_tqdm=False)
            back = output.multimodal_output["additional_information"]["image"]
            assert back.tobytes() == image.tobytes()
    assert seen.read_text().split() == ["LeafRef"] * 3


def note_kind(edge: Any) -> Any:
    """An edge that writes down what the driver has in its hands."""
    (outputs,) = edge.outputs.values()
    info = outputs[0]["additional_information"]
    with open(info["seen"], "a", encoding="utf-8") as file:
        file.write(type(info["image"]).__name__ + "\n")
    return outputs[0]


def test_running_out_of_files_is_a_typed_error() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    arena = Arena()
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 6, hard))
    try:
        with pytest.raises(ConnectorError, match="no shared memory of 65536 bytes: Too many open files"):
            _ = [arena.write(10, lambda view: None) for _ in range(10)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        arena.close()
