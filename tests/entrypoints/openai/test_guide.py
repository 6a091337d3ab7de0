"""The requests of the serving guide and the examples, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import wave
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.entrypoints.openai.server import Server

ROOT = Path(__file__).parents[3]
GUIDE = ROOT / "docs" / "user_guide" / "serving.md"
EXAMPLES = ROOT / "examples" / "online_serving"
BLOCK = re.compile(r"^<!-- run: (\w+) -->\n```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ADDRESS = "http://localhost:8000"
SMALLER = {"1024x1024": "256x256", '"height": 512, "width": 768': '"height": 128, "width": 192'}
"""Sizes of the guide -> what the test's server allows."""


@dataclass(frozen=True)
class Block:
    """A request of the guide."""

    server: str
    language: str
    text: str


BLOCKS = [Block(*match) for match in BLOCK.findall(GUIDE.read_text())]
REFERENCE = [Block(*match) for match in BLOCK.findall((GUIDE.parent / "api_reference.md").read_text())]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with what the requests read."""
    Image.new("RGB", (96, 64), (9, 99, 199)).save(tmp_path / "photo.png")
    with wave.open(str(tmp_path / "question.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(range(256)) * 125)
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    """What a command prints; it must succeed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_block(block: Block, server: Server, folder: Path) -> str:
    text = block.text.replace(ADDRESS, server.url)
    for size, small in SMALLER.items():
        text = text.replace(size, small)
    assert server.url in text
    if block.language == "python":
        return run([sys.executable, "-c", text.replace('api_key="none"', f'api_key="{server.api_key}"')], folder)
    return run(
        ["bash", "-ec", text.replace("curl ", f'curl -sSf -H "authorization: Bearer {server.api_key}" ')], folder
    )


def blocks(server: str) -> list[Block]:
    """The requests of the reference for one server."""
    return [block for block in REFERENCE if block.server == server]


@pytest.mark.parametrize("block", blocks("pictures"), ids=lambda b: b.language)
def test_reference_of_pictures(block: Block, pictures: Server, folder: Path) -> None:
    run_block(block, pictures, folder)


@pytest.mark.parametrize("block", blocks("omni"), ids=lambda b: b.language)
def test_reference_of_omni_models(block: Block, omni_server: Server, folder: Path) -> None:
    assert run_block(block, omni_server, folder)


def test_the_guide_has_requests() -> None:
    assert [block.server for block in BLOCKS].count("pictures") >= 4
    assert [block.server for block in BLOCKS].count("omni") >= 3


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.server == "pictures"], ids=lambda b: b.language)
def test_requests_for_pictures(block: Block, pictures: Server, folder: Path) -> None:
    printed = run_block(block, pictures, folder)
    if block.language == "bash":
        assert "b64_json" in printed or "data:image/png;base64" in printed
    for path in folder.glob("lighthouse-*.png"):
        assert Image.open(path).size == (256, 256)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.server == "omni"], ids=lambda b: b.language)
def test_requests_for_speech(block: Block, omni_server: Server, folder: Path) -> None:
    run_block(block, omni_server, folder)
    (made,) = [path for path in folder.iterdir() if path.name in ("answer.wav", "answer.pcm", "morning.wav")]
    if made.suffix == ".wav":
        with wave.open(str(made)) as file:
            assert file.getnframes() == 12 * 1920 - 555
    else:
        assert made.stat().st_size == 2 * (12 * 1920 - 555)


def test_example_of_pictures(pictures: Server, folder: Path) -> None:
    words = ["--base-url", pictures.url + "/v1", "--api-key", pictures.api_key, "--model", "flux", "--size", "64x48"]
    run([sys.executable, str(EXAMPLES / "text_to_image.py"), "steps", *words, "--output", "made.png"], folder)
    assert Image.open(folder / "made.png").size == (64, 48)


def test_example_of_speech(omni_server: Server, folder: Path) -> None:
    words = ["--base-url", omni_server.url + "/v1", "--image", "photo.png", "--audio", "question.wav"]
    run([sys.executable, str(EXAMPLES / "omni_chat.py"), "what is it", *words, "--output", "made.wav"], folder)
    with wave.open(str(folder / "made.wav")) as file:
        assert file.getnframes() == 12 * 1920 - 555
