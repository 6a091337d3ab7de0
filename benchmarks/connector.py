"""How fast a payload gets from one process to another (workload W7).

::

    python benchmarks/connector.py --json out.json

A producer and a consumer process; a bf16 tensor of each size and a dictionary of ten plain values. Measured from
``put`` to the usable tensor in the consumer (one clock, CLOCK_MONOTONIC); the metadata goes through a pipe, as it
goes through the driver's socket in a running system, and the pipe's own latency is reported beside it. In the same
run, interleaved: one copy of as many bytes within a process (memcpy), and vLLM's ``MessageQueue`` where vLLM is
installed. Figures are medians of the best of ``--repeats`` rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZES = {"4 KB": 4 << 10, "64 KB": 64 << 10, "1 MB": 1 << 20, "16 MB": 16 << 20, "128 MB": 128 << 20}
EXTRA = {f"key{i}": i * 1.5 for i in range(10)}


def consume(pipe: Connection, handle: Any) -> None:
    """The other process: fetches each payload and answers with the time at which the tensor was usable."""
    from vllm_omni.distributed.omni_connectors import SharedMemoryConnector

    queue = None
    with SharedMemoryConnector() as connector:
        while (order := pipe.recv()) is not None:
            kind, value = order
            if kind == "ping":
                pipe.send(time.monotonic())
            elif kind == "connector":
                found = connector.get("0", "1", "r/0", value)
                assert found is not None
                tensor = found[0]["t"]
                arrived = time.monotonic()
                total = float(tensor[0]) + float(tensor[-1])
                del found, tensor
                pipe.send((arrived, total))
            else:
                if queue is None:
                    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

                    queue = MessageQueue.create_from_handle(handle, 0)
                    pipe.send("joined")
                    queue.wait_until_ready()
                    continue
                item = queue.dequeue(timeout=60)
                pipe.send((time.monotonic(), float(item["t"][0]) + float(item["t"][-1])))


def time_connector(pipe: Connection, connector: Any, tensor: Any) -> float:
    """Seconds from put to usable tensor."""
    began = time.monotonic()
    _, _, metadata = connector.put("0", "1", "r/0", {"t": tensor, **EXTRA})
    pipe.send(("connector", metadata))
    arrived, total = pipe.recv()
    assert total == float(tensor[0]) + float(tensor[-1])
    return float(arrived - began)


def time_queue(pipe: Connection, queue: Any, tensor: Any) -> float:
    """The same through vLLM's MessageQueue."""
    pipe.send(("queue", None))
    began = time.monotonic()
    queue.enqueue({"t": tensor, **EXTRA})
    arrived, _ = pipe.recv()
    return float(arrived - began)


def time_memcpy(source: memoryview, target: memoryview) -> float:
    """One copy within this process."""
    began = time.monotonic()
    target[:] = source
    return time.monotonic() - began


def time_ping(pipe: Connection) -> float:
    """One way through the pipe with nothing in it."""
    began = time.monotonic()
    pipe.send(("ping", None))
    return float(pipe.recv() - began)


def measure(pipe: Connection, nbytes: int, count: int, repeats: int, queue: Any) -> dict[str, float]:
    """Median seconds of each contender, best round."""
    import torch

    from vllm_omni.distributed.omni_connectors import SharedMemoryConnector

    tensor = torch.randn(nbytes // 2).to(torch.bfloat16)
    source = memoryview(bytearray(os.urandom(1 << 12) * (nbytes >> 12)))
    target = memoryview(bytearray(nbytes))
    rounds: dict[str, list[float]] = {"connector": [], "memcpy": [], "pipe": []}
    if queue is not None:
        rounds["vllm_message_queue"] = []
    with SharedMemoryConnector() as connector:
        for _ in range(repeats + 1):
            took: dict[str, list[float]] = {name: [] for name in rounds}
            for _ in range(count):
                took["connector"].append(time_connector(pipe, connector, tensor))
                took["memcpy"].append(time_memcpy(source, target))
                took["pipe"].append(time_ping(pipe))
                if queue is not None:
                    took["vllm_message_queue"].append(time_queue(pipe, queue, tensor))
            for name, values in took.items():
                rounds[name].append(statistics.median(values))
    return {name: min(values[1:]) for name, values in rounds.items()}


def join_queue(pipe: Connection, queue: Any) -> None:
    """Let the consumer join vLLM's queue."""
    pipe.send(("queue", None))
    assert pipe.recv() == "joined"
    queue.wait_until_ready()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--count", type=int, default=40, help="payloads a round (a tenth of it above 16 MB)")
    parser.add_argument("--no-vllm", action="store_true", help="leave vLLM's MessageQueue out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    queue = None
    if not args.no_vllm:
        from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

        queue = MessageQueue(1, 1, max_chunk_bytes=160 << 20, max_chunks=2)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    handle = queue.export_handle() if queue is not None else None
    process = context.Process(target=consume, args=(theirs, handle), daemon=True)
    process.start()
    if queue is not None:
        join_queue(pipe, queue)
    figures: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    }
    for name, nbytes in SIZES.items():
        count = max(3, args.count // 10) if nbytes > 16 << 20 else args.count
        figures[name] = {key: value * 1e6 for key, value in measure(pipe, nbytes, count, args.repeats, queue).items()}
        print(name, " ".join(f"{key} {value:.0f} us" for key, value in figures[name].items()), flush=True)
    pipe.send(None)
    process.join()
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
