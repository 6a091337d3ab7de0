"""``vllm-omni serve`` as a process of its own, as users start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import OpenAI

from tests.entrypoints.graphs import stage, write

ROOT = Path(__file__).parents[3]
PICTURES = "tests.entrypoints.openai.picture_stage.PictureStage"
START_S = 660
"""Longer than the server itself waits for its stages: its own error is what one sees, also on a busy machine."""


def picture_stages(folder: Path) -> str:
    """Configuration of one stage that draws without a model."""
    return write(folder, [stage(0, final="image", engine={"engine_cls": PICTURES})])


class Server:
    """A running server. Its log is kept in ``lines``."""

    def __init__(self, *arguments: str, api_key: str | None = None, **env: str) -> None:
        command = [sys.executable, "-m", "vllm_omni", "serve", "--port", "0", *arguments]
        if api_key is not None:
            env["VLLM_API_KEY"] = api_key
        self.api_key = api_key or "none"
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "OMP_NUM_THREADS": "1", **env},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._up = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""
        try:
            assert self._up.wait(START_S) and self.url, "the server did not start:\n" + self.log  # noqa: PT018
            headers = {"authorization": f"Bearer {self.api_key}"}
            self.http = httpx.Client(base_url=self.url, timeout=60, headers=headers)
            self.openai = OpenAI(base_url=self.url + "/v1", api_key=self.api_key, max_retries=0, timeout=60)
        except BaseException:  # a time-out of the test and Ctrl-C, too: nothing is left behind
            self.process.kill()
            raise

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            match = re.search(r"serving .* on (https?://\S+)", line)
            if match is not None:
                self.url = match[1]
                self._up.set()
        self._up.set()

    @property
    def log(self) -> str:
        """Everything that it wrote."""
        return "\n".join(self.lines)

    def children(self) -> list[psutil.Process]:
        """All processes that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        """POST JSON."""
        return self.http.post(path, json=body, **more)

    def stop(self) -> int:
        """SIGTERM, and wait; the exit status. Fails when a process of it is left."""
        children = self.children() if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        self._reader.join(10)
        self.http.close()
        _, left = psutil.wait_procs(children, 10)
        for process in left:
            process.kill()
        assert not left, left
        return status


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error that an answer reports; checks its form."""
    body = answer.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error
