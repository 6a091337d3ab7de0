"""The quickstart's commands and the examples, run as they stand, on tiny checkpoints."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from tests.ratchets.source import ROOT
from vllm_omni.diffusion.tiny_models import make_tiny_model

EXAMPLES = ROOT / "examples" / "offline_inference"
QUICKSTART = ROOT / "docs" / "getting_started" / "quickstart.md"
SECONDS = 240


def _run(folder: Path, *command: str | Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", QUICKSTART.read_text(), re.MULTILINE | re.DOTALL)


def _largest_difference(one: Image.Image, other: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(one, other).getextrema())


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen-image", tmp_path_factory.mktemp("tiny-qwen"))


def test_quickstart(tmp_path: Path) -> None:
    """Its ``vllm-omni`` commands in order, then its script."""
    ran = 0
    for block in _blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if words[:1] == ["vllm-omni"] and words[1] != "serve":  # a server does not end
                _run(tmp_path, sys.executable, "-m", "vllm_omni", *words[1:])
                ran += 1
    assert ran == 3
    first, again = Image.open(tmp_path / "coffee.png"), Image.open(tmp_path / "again.png")
    assert first.size == (64, 64)
    assert first.tobytes() == again.tobytes()
    assert len(first.getcolors(64 * 64)) > 100, "a picture, not one colour"

    (script,) = _blocks("python")
    (tmp_path / "script.py").write_text(script)
    _run(tmp_path, sys.executable, "script.py")
    # The same prompt, seed and sizes, in a batch with another prompt: rounding may differ in the last bit.
    assert _largest_difference(Image.open(tmp_path / "picture-0.png"), first) <= 1
    assert _largest_difference(Image.open(tmp_path / "picture-1.png"), first) > 1


def test_text_to_image(tmp_path: Path, tiny_qwen: Path) -> None:
    out = _run(
        tmp_path, sys.executable, EXAMPLES / "text_to_image" / "text_to_image.py", "a cup", "a tree",
        "--model", tiny_qwen, "--height", "64", "--width", "96", "--steps", "2", "--negative-prompt", "people",
    )  # fmt: skip
    assert out.splitlines() == ["outputs/0.png: a cup", "outputs/1.png: a tree"]
    pictures = [Image.open(tmp_path / "outputs" / f"{number}.png") for number in (0, 1)]
    assert [picture.size for picture in pictures] == [(96, 64)] * 2
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_custom_pipeline(tmp_path: Path, tiny_qwen: Path) -> None:
    out = _run(
        tmp_path, sys.executable, EXAMPLES / "custom_pipeline" / "trajectory.py",
        "--model", tiny_qwen, "--height", "64", "--width", "64", "--steps", "4",
    )  # fmt: skip
    facts = dict(re.split(r":\s+", line, maxsplit=1) for line in out.splitlines())
    assert len(ast.literal_eval(facts["timesteps"])) == 4
    assert ast.literal_eval(facts["latents"])[0] == 4
    moves = ast.literal_eval(facts["moves"])
    assert len(moves) == 3
    assert all(move > 0 for move in moves)
    assert Image.open(tmp_path / "outputs" / "trajectory.png").size == (64, 64)


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert path.read_text().count("\n") <= 80
