"""``vllm-omni generate``: what is written, reported and left behind. The stage paints (``picture_stage``)."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.ratchets.source import ROOT
from vllm_omni.entrypoints.cli.main import run
from vllm_omni.entrypoints.cli.pictures import read_recipe

Generate = Callable[..., tuple[int, list[str], list[str]]]

STAGES = """
stage_args:
  - stage_id: 0
    stage_type: diffusion
    final_output: true
    final_output_type: image
    engine_args:
      engine_cls: tests.cli.picture_stage.PictureStage
    default_sampling_params:
      width: 48
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stages") / "stages.yaml"
    path.write_text(STAGES)
    return path


@pytest.fixture
def generate(stages: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Generate:
    """Run ``generate``; gives status, lines of stdout, lines of stderr."""

    def call(*arguments: str | Path) -> tuple[int, list[str], list[str]]:
        words = ["generate", *map(str, arguments)]
        if "--from-png" not in words:
            words += ["--stage-configs-path", str(stages)]
        status = run([*words, "--output-dir", str(tmp_path / "out")])
        captured = capfd.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return call


def test_one_prompt(generate: Generate, tmp_path: Path) -> None:
    status, out, _ = generate("A cup of coffee!", "--seed", "5", "--height", "32")
    assert status == 0
    path = tmp_path / "out" / "a-cup-of-coffee.png"
    assert out == [str(path)]
    with Image.open(path) as image:
        assert image.size == (48, 32), "the option, and the stage's own default beside it"
        assert image.getpixel((0, 0)) == (5, 0, 3)
    recipe = read_recipe(path)
    assert (recipe.prompt, recipe.seed) == ("A cup of coffee!", 5)
    assert recipe.sampling_params == {"width": 48, "height": 32, "num_inference_steps": 3}


def test_a_picture_is_drawn_again_and_varied(generate: Generate, tmp_path: Path) -> None:
    first, again, other = (tmp_path / f"{name}.png" for name in ("first", "again", "other"))
    assert generate("a tree", "--num-inference-steps", "4", "--negative-prompt", "leaves", "-o", first)[0] == 0
    assert generate("--from-png", first, "-o", again)[0] == 0
    assert again.read_bytes() == first.read_bytes()
    assert generate("--from-png", first, "-o", other, "--seed", "9")[0] == 0
    recipe = read_recipe(other)
    assert (recipe.seed, recipe.negative_prompt, recipe.sampling_params["num_inference_steps"]) == (9, "leaves", 4)


def test_an_empty_prompt_is_refused_and_a_blank_draws(generate: Generate, tmp_path: Path) -> None:
    status, out, err = generate("")
    assert (status, out) == (2, [])
    assert "prompt: the text is empty" in err[-1]
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": ""}\n{"prompt": " "}\n')
    status, out, err = generate("--prompts-file", file)
    assert status == 1
    assert "line 1: prompt: the text is empty" in err[-1]
    assert len(out) == 1
    assert Path(out[0]).suffix == ".png"


def test_files_of_several_outputs_and_nothing_is_overwritten(generate: Generate, tmp_path: Path) -> None:
    assert generate("a", "--num-outputs-per-prompt", "2")[0] == 0
    assert generate("a", "--num-outputs-per-prompt", "2")[0] == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a-1-2.png", "a-1.png", "a-2-2.png", "a-2.png"]
    assert read_recipe(tmp_path / "out" / "a-2.png").index == 1


def test_a_file_of_prompts_with_good_and_bad_lines(generate: Generate, tmp_path: Path) -> None:
    rows = [
        {"prompt": "red", "seed": 200, "output": "named.png"},
        {"prompt": "refused"},
        {"prompt": "blue", "sede": 1},
        {"prompt": "small", "height": 3},
        {"prompt": "array", "output_type": "np"},
        {"prompt": "plain"},
        {"prompt": "jpeg", "output": "a.jpg"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join([*map(json.dumps, rows), "{broken"]) + "\n")
    status, out, err = generate("--prompts-file", file, "--seed", "3")
    assert status == 1
    assert {Path(line).name for line in out} == {"named.png", "00005-array.npy", "00006-plain.png"}
    assert {line.split(":")[0] for line in err} == {"line 2", "line 3", "line 4", "line 7", "line 8"}
    assert "told to refuse" in " ".join(err)
    assert "did you mean 'seed'" in " ".join(err)
    assert read_recipe(tmp_path / "out" / "named.png").seed == 200
    assert read_recipe(tmp_path / "out" / "00006-plain.png").seed == 3
    assert np.load(tmp_path / "out" / "00005-array.npy").shape == (16, 48, 3)


def test_show_draws_the_picture(generate: Generate) -> None:
    status, out, _ = generate("bright", "--seed", "255", "--width", "64", "--height", "64", "--show")
    assert status == 0
    assert len(out) == 43, "the file written, a gap, its name again, and 80 columns of a square"
    assert all(line.isascii() for line in out)


def test_on_a_terminal_there_are_bars_and_colours(stages: Path, tmp_path: Path) -> None:
    """The terminal is a pseudo-terminal; what is left on it is the file's name and the picture."""
    main, side = pty.openpty()
    command = [sys.executable, "-m", "vllm_omni", "generate", "a cup", "--stage-configs-path", stages, "--show"]
    environ = {**os.environ, "COLORTERM": "truecolor", "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    environ.pop("NO_COLOR", None)
    with subprocess.Popen(
        [*command, "--output-dir", tmp_path, "--seed", "200", "--num-inference-steps", "500"],
        stdin=side, stdout=side, stderr=side, cwd=ROOT, env=environ,
    ) as process:  # fmt: skip
        os.close(side)
        seen = bytearray()
        with contextlib.suppress(OSError):  # the end of a pseudo-terminal
            while data := os.read(main, 65536):
                seen += data
        os.close(main)
    text = seen.decode()
    assert process.returncode == 0
    assert "starting" in text
    assert "/500" in text
    assert "steps" in text
    assert str(tmp_path / "a-cup.png") in text
    assert "\x1b[38;2;200;0;" in text
    assert "\u2580" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a prompt"),
        (("a", "--prompts-file", "x.txt"), "only one of them"),
        (("--prompts-file", "missing.txt"), "No such file"),
        (("a", "--height", "3"), "height=3: allowed is 16"),
        (("a", "--hieght", "64"), "--height"),
        (("a", "--output-type", "jpg"), "--output-type"),
        (("--from-png", "pyproject.toml"), "is not a picture"),
        (("a", "--dtype", "float32"), "dtype"),
        (("a", "-o", "a.jpg"), "is written as .png"),
        (("a", "-o", "a.png", "--output-type", "np"), "is written as .npy"),
        (("a", "-o", "/dev/null/a.png"), "output cannot be written"),
        (("refused",), "told to refuse"),
    ],
)
def test_bad_input_is_one_line_and_status_2(generate: Generate, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = generate(*arguments)
    assert status == 2
    assert out == []
    assert len(err) == 1
    assert err[0].startswith("vllm-omni: ")
    assert message in err[0]


def test_a_stage_that_dies_is_a_failure(generate: Generate) -> None:
    status, out, err = generate("die")
    assert (status, out) == (1, [])
    assert err[-1].startswith("vllm-omni: ")


def test_ctrl_c_keeps_what_is_finished(stages: Path, tmp_path: Path) -> None:
    """The first prompt is written, the second never ends; nothing is left running."""
    file = tmp_path / "prompts.txt"
    file.write_text("done\nwait\n")
    command = [sys.executable, "-m", "vllm_omni", "generate", "--prompts-file", file, "--stage-configs-path", stages]
    with subprocess.Popen(
        [*command, "--output-dir", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        written = process.stdout.readline().strip()
        children = _children(process.pid)
        assert children
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=30)
        errors = process.stderr.read()
    assert status == 130
    assert errors == "vllm-omni: stopped\n"
    assert read_recipe(Path(written)).prompt == "done"
    assert not [pid for pid in children if os.path.exists(f"/proc/{pid}")]


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]
