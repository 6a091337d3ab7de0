"""Life and death of a server: signals, dead workers, wrong starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.entrypoints.graphs import stage, write
from tests.entrypoints.openai.server import PICTURES, ROOT, Server, error_of, picture_stages

PATH = "/v1/images/generations"


def within_a_second(server: Server) -> dict[str, object]:
    """What /health says once it has turned to 503; fails when that takes a second or more."""
    begun = time.monotonic()
    while (answer := server.http.get("/health")).status_code == 200:
        assert time.monotonic() - begun < 1.0
    assert answer.status_code == 503
    return error_of(answer)


def test_kill_of_an_idle_stage(tmp_path: Path) -> None:
    path = write(tmp_path, [stage(i, final="image", engine={"engine_cls": PICTURES}) for i in (0, 1)])
    server = Server("--stage-configs-path", path, "--model", "none")
    try:
        assert server.http.get("/health").status_code == 200
        assert server.http.get("/ready").json() == {"status": "ready"}
        victim = next(child for child in server.children() if child.name().startswith("omni-stage-1"))
        victim.kill()
        assert "stage 1" in str(within_a_second(server)["message"])
        assert error_of(server.http.get("/ready"))["code"] == "not_ready"
        answer = server.post(PATH, {"prompt": "x"})
        assert (answer.status_code, error_of(answer)["type"]) == (503, "server_error")
    finally:
        assert server.stop() == 0


def test_deadline_and_kill_while_a_request_runs(tmp_path: Path) -> None:
    server = Server("--stage-configs-path", picture_stages(tmp_path), "--model", "none", "--request-timeout", "1")
    try:
        for stream in (False, True):
            answer = server.post(PATH, {"prompt": "slow slow", "stream": stream})
            assert answer.status_code == 200
            late = server.post(PATH, {"prompt": "hang", "stream": stream})
            if stream:  # has begun: the error is its last event
                assert late.text.rstrip().splitlines()[-1].startswith('data: {"error"')
            else:
                assert (late.status_code, error_of(late)["type"]) == (504, "server_error")
        answer = server.post(PATH, {"prompt": "kill"})
        assert (answer.status_code, error_of(answer)["type"]) == (503, "server_error")
        within_a_second(server)
    finally:
        assert server.stop() == 0


def test_sigterm_drains(tmp_path: Path) -> None:
    """Open requests are answered, new connections are refused, nothing is left."""
    shared = set(os.listdir("/dev/shm"))
    server = Server("--stage-configs-path", picture_stages(tmp_path), "--model", "none")
    children = server.children()
    assert children
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(server.post(PATH, {"prompt": "slow"}))) for _ in range(4)]
    for thread in threads:
        thread.start()
    while server.http.get("/health").json()["open_requests"] < 4:
        pass
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(30)
    assert [answer.status_code for answer in answers] == [200] * 4
    assert server.process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")
    assert not psutil.wait_procs(children, 10)[1]
    pids = {str(child.pid) for child in (*children, server.process)}
    left = [name for name in set(os.listdir("/dev/shm")) - shared if any(pid in name for pid in pids)]
    assert left == []


def test_drain_does_not_wait_for_ever(tmp_path: Path) -> None:
    server = Server(
        *("--stage-configs-path", picture_stages(tmp_path), "--model", "none", "--drain-timeout", "1"),
        *("--ssl-certfile", *certificate(tmp_path)),
        **{"SSL_CERT_FILE": ""},
    )
    assert server.url.startswith("https://")
    client = httpx.Client(base_url=server.url, verify=False, timeout=30)
    assert client.get("/health").status_code == 200
    failures: list[str] = []

    def hang() -> None:
        try:
            failures.append(str(client.post(PATH, json={"prompt": "hang"}).status_code))
        except httpx.HTTPError as error:
            failures.append(type(error).__name__)

    thread = threading.Thread(target=hang)
    thread.start()
    while httpx.get(server.url + "/health", verify=False).json()["open_requests"] < 1:
        pass
    begun = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begun < 15
    thread.join(10)
    assert len(failures) == 1
    assert failures != ["200"]


def certificate(folder: Path) -> list[str]:
    """A certificate and its key, with the option between them."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*words, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return [str(cert), "--ssl-keyfile", str(key)]


def run(*arguments: str) -> tuple[int, str]:
    """Status and message of a server that does not come up."""
    command = [sys.executable, "-m", "vllm_omni", "serve", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_wrong_starts(tmp_path: Path) -> None:
    status, line = run("none", "--prot", "1")
    assert (status, "--port" in line) == (2, True)
    status, line = run("none", "--port", "70000")
    assert (status, "allowed is 0 to 65535" in line) == (2, True)
    status, line = run("none", "--model", "none")
    assert (status, "given twice" in line) == (2, True)
    with Listener() as port:
        status, line = run("--stage-configs-path", picture_stages(tmp_path), "--port", str(port))
        assert (status, f"127.0.0.1:{port}" in line) == (2, True)


class Listener:
    """A port that is taken."""

    def __enter__(self) -> int:
        import socket

        self._sock = socket.create_server(("127.0.0.1", 0))
        return int(self._sock.getsockname()[1])

    def __exit__(self, *exc: object) -> None:
        self._sock.close()
