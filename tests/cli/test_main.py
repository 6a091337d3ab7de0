"""The command itself: it starts fast, and every error is one line with a status."""

import importlib
import inspect
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_omni import envs
from vllm_omni.diffusion.registry import supported_models
from vllm_omni.entrypoints.cli import config, models, tiny_model
from vllm_omni.entrypoints.cli.main import COMMANDS, run
from vllm_omni.model_executor.families import FAMILIES
from vllm_omni.version import __version__

HEAVY = ("torch", "vllm", "diffusers", "transformers", "numpy")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """Run a command line; gives status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: str) -> tuple[int, str, str]:
        status = run(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("generate", "--help"), ("models",)], ids=" ".join)
def test_nothing_heavy_is_imported(arguments: tuple[str, ...]) -> None:
    """What makes the command answer in a tenth of a second; the clock itself would be a flaky test."""
    program = (
        "import sys\nfrom vllm_omni.entrypoints.cli.main import run\n"
        f"status = run({list(arguments)!r})\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.strip().endswith("HEAVY []")


def test_version_as_a_user_runs_it() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "vllm_omni", "--version"], capture_output=True, text=True)
    assert done.stdout == f"vllm-omni {__version__}\n"
    assert done.returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_without_arguments(cli) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = cli()
    assert status == 0
    for command, (_, line) in COMMANDS.items():
        assert command in out
        assert line in out


@pytest.mark.parametrize("function", [models.models, tiny_model.tiny_model], ids=lambda function: function.__name__)
def test_the_list_of_commands_says_what_the_commands_say(function: object) -> None:
    lines = [line for _, line in COMMANDS.values()]
    assert inspect.getdoc(function).splitlines()[0] in lines  # type: ignore[union-attr]


def test_every_command_has_a_module_that_registers_it() -> None:
    for module, _ in COMMANDS.values():
        assert callable(importlib.import_module(module).register)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generat",), "Did you mean 'generate'"),
        (("--verson",), "--version"),
        (("config", "shwo"), "show"),
        (("tiny-model",), "family"),
        (("tiny-model", "flex", "x"), "there are flux"),
        (("config", "show", "--model", "no/such-model"), "neither a folder nor"),
        (("config", "show", "--stage-configs-path", "missing.yaml"), "missing.yaml"),
    ],
)
def test_errors_are_one_line(cli, arguments: tuple[str, ...], message: str) -> None:  # type: ignore[no-untyped-def]
    status, out, err = cli(*arguments)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("vllm-omni: ")
    assert message in err


def test_traceback_on_demand() -> None:
    command = [sys.executable, "-m", "vllm_omni", "config", "show", "--model", "no/such-model", "--traceback"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" in done.stderr
    assert "ConfigError: model='no/such-model'" in done.stderr


def test_without_a_model_it_is_the_package_s(cli) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = cli("config", "show", "--json")
    assert status == 0
    assert "default_model" in out


def test_models_lists_the_registry(cli) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = cli("models", "--json")
    rows = {row["class"]: row for row in json.loads(out)}
    assert status == 0
    omni = {family.architecture: family for family in FAMILIES}
    assert set(rows) == set(supported_models()) | set(omni)
    for name, features in supported_models().items():
        assert set(rows[name]["checkpoints"]) == set(features.models)
        assert rows[name]["features"]["tensor_parallel"] is features.tensor_parallel
    text = cli("models")[1]
    assert all(name in text for name in rows)
    assert "num_inference_steps 28" in text
    for name, family in omni.items():
        assert rows[name]["checkpoints"] == list(family.checkpoints)
        assert {stage["final_output_type"] for stage in rows[name]["stages"]} == {*family.writes, None}
    assert "qwen3_omni_moe_thinker_only" in text
    assert "stage 0   thinker (ar) -> text" in text


def test_tiny_omni_model_brings_its_stages(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = cli("tiny-model", "qwen3-omni", str(tmp_path / "tiny"))
    assert status == 0
    stages = str(tmp_path / "tiny" / "stages.yaml")
    assert f"--stage-configs-path {stages}" in out
    status, out, _ = cli("config", "show", "--model", str(tmp_path / "tiny"), "--stage-configs-path", stages, "--json")
    assert status == 0
    assert "Qwen3OmniCode2WavForConditionalGeneration" in out
    status, _, err = cli("tiny-model", "qwen4-omni", str(tmp_path / "other"))
    assert status == 2
    assert "qwen2.5-omni, qwen3-omni" in err


def test_defaults_of_the_list_are_those_of_the_pipelines() -> None:
    from vllm_omni.diffusion.models.qwen_image import QwenImagePipeline

    row = next(row for row in models.model_rows() if row["class"] == "QwenImagePipeline")
    assert row["checkpoints"]["Qwen/Qwen-Image"]["defaults"]["num_inference_steps"] == (
        QwenImagePipeline.defaults.num_inference_steps
    )


STAGES = """stage_args:
  - stage_id: 0
    stage_type: diffusion
    final_output: true
    final_output_type: image
    engine_args:
      max_num_seqs: 3
"""


def test_config_show_says_where_each_value_comes_from(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    stages = tmp_path / "stages.yaml"
    stages.write_text(STAGES)
    status, out, _ = cli("config", "show", "--model", str(tmp_path), "--dtype", "float32",
                         "--stage-configs-path", str(stages), "--json")  # fmt: skip
    assert status == 0
    rows = {row["key"]: row for row in json.loads(out)}
    args = "stage_args[0].engine_args"
    assert (rows[f"{args}.max_num_seqs"]["value"], rows[f"{args}.max_num_seqs"]["source"]) == (3, f"{stages}:7")
    assert (rows[f"{args}.dtype"]["value"], rows[f"{args}.dtype"]["source"]) == ("float32", "--dtype")
    assert rows[f"{args}.vae_use_tiling"] == {"key": f"{args}.vae_use_tiling", "value": False, "source": "default"}
    assert rows["model"]["source"] == "--model"
    text = cli("config", "show", "--model", str(tmp_path))[1]
    assert re.search(r"engine_args\.max_num_seqs +8 +default", text)


def test_config_show_lists_the_environment(cli, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "sdpa")
    rows = {row["name"]: row for row in json.loads(cli("config", "show", "--env", "--json")[1])}
    assert set(rows) == set(envs.REGISTRY)
    assert rows["DIFFUSION_ATTENTION_BACKEND"]["value"] == "SDPA"
    assert "DIFFUSION_ATTENTION_BACKEND" in cli("config", "show", "--env")[1]


def test_config_without_a_command_prints_its_help(cli) -> None:  # type: ignore[no-untyped-def]
    status, out, err = cli("config")
    assert (status, err) == (2, "")
    assert "show" in out
    assert "Usage:" in out


def test_long_values_are_cut_in_the_table_alone() -> None:
    assert len(config._text("x" * 1000)) == config.MAX_VALUE_WIDTH


def test_tiny_model_refuses_a_folder_that_is_in_use(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "mine").write_text("")
    status, _, err = cli("tiny-model", "flux", str(tmp_path))
    assert status == 2
    assert "not an empty folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
