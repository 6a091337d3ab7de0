"""schemathesis over the OpenAPI document: nothing that a client sends is an error of the server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.entrypoints.openai.server import Server


def fuzz(server: Server, folder: Path, *paths: str) -> None:
    """Send what the document allows and what it does not; every answer is below 500."""
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", server.url + "/openapi.json"]
    command += ["--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--max-examples", "10", "--seed", "1"]
    command += ["--header", f"Authorization: Bearer {server.api_key}", "--no-color"]
    for path in paths:
        command += ["--include-path", path]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(paths)} passed" in done.stdout, done.stdout
    assert server.http.get("/health").json()["status"] == "ok"


def test_pictures(pictures: Server, tmp_path: Path) -> None:
    fuzz(pictures, tmp_path, "/v1/images/generations", "/v1/chat/completions", "/v1/models/{model}")


def test_text_and_speech(omni_server: Server, tmp_path: Path) -> None:
    fuzz(omni_server, tmp_path, "/v1/chat/completions", "/v1/audio/speech")
