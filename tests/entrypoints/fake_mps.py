"""Stands for ``nvidia-cuda-mps-control``: detaches itself, listens on a socket, and quits when it is told to.

``FAKE_MPS`` is a file with its orders, one word: ``hang`` (it never comes up), ``refuse`` or ``work``. What it did is
in the file beside it, ``.did``: one line of JSON for every start.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

PIPES, LOGS = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"]), Path(os.environ.get("CUDA_MPS_LOG_DIRECTORY", "/nowhere"))
CONTROL = str(PIPES / "control")


def start() -> None:
    """``-d``: returns in the parent when the daemon listens."""
    orders = Path(os.environ["FAKE_MPS"])
    (LOGS / "control.log").write_text("started\nno such device\n")
    if orders.read_text() == "refuse":
        sys.exit("An instance of this daemon is already running")
    read, write = os.pipe()
    if os.fork():
        os.read(read, 1)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    with orders.with_suffix(".did").open("a") as did:
        did.write(json.dumps({"pid": os.getpid(), "env": dict(os.environ)}) + "\n")
    if orders.read_text() == "hang":
        time.sleep(600)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(CONTROL)
        server.listen()
        os.write(write, b"x")
        connection, _ = server.accept()
        with connection:
            assert connection.recv(64) == b"quit\n"
    (orders.with_suffix(".quit")).touch()
    os._exit(0)


def ask() -> None:
    """Without arguments: pass the line on."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(CONTROL)
        client.sendall(sys.stdin.buffer.readline())
        client.recv(1)


if __name__ == "__main__":
    start() if sys.argv[1:] == ["-d"] else ask()
