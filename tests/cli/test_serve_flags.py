"""The command line of ``serve``: whose options are taken, and what is said of those that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from vllm_omni.entrypoints.cli import main, serve
from vllm_omni.entrypoints.cli.vllm_flags import _FLAGS_INSTEAD, divide
from vllm_omni.entrypoints.omni_args import DEFAULT_MODEL, resolve
from vllm_omni.errors import ConfigError

PLAIN = """
stage_args:
  - {stage_id: 0, stage_type: ar, engine_args: {model: one, dtype: float32}}
  - {stage_id: 1, stage_type: ar, engine_input_source: [0], engine_args: {model: one}, final_output: true}
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the server would be started with."""
    from vllm_omni.entrypoints.openai import server

    calls: list[Any] = []
    monkeypatch.setattr(server, "run_server", lambda *args: calls.append(args))
    return calls


def test_names_of_the_model() -> None:
    """What was asked for; else the model as it was given, but for the package's own."""
    from vllm_omni.entrypoints.openai.args import ServeArgs
    from vllm_omni.entrypoints.openai.server import served_names

    assert list(served_names(ServeArgs(served_model_name=["a", "b"]), str(DEFAULT_MODEL))) == ["a", "b"]
    assert list(served_names(ServeArgs(), "path/to/FLUX.1-dev")) == ["path/to/FLUX.1-dev"]
    assert list(served_names(ServeArgs(), str(DEFAULT_MODEL))) == ["default"]


def test_vllms_options_beside_ours(started: list[Any]) -> None:
    words = ["serve", "--max-model-len", "1k", "model", "--omni", "--enable-prefix-caching", "--tensor-parallel-size=2"]
    words += ["--limit-mm-per-prompt", '{"image": 2}', "--port", "0", "--api-key", "x", "--served-model-name", "a,b"]
    assert main.run([*words, "--no-enable-chunked-prefill", "--chat-template-content-format", "openai"]) == 0
    ((args, text, arguments),) = started
    assert (args.port, args.api_key, args.served_model_name) == (0, "x", ["a", "b"])
    assert text.chat_template_content_format == "openai"
    limits = arguments.pop("limit_mm_per_prompt")
    assert arguments == {
        "model": "model",
        "max_model_len": 1000,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": False,
        "tensor_parallel_size": 2,
    }
    assert set(limits) == {"image"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-model-ln", "3"], "did you mean '--max-model-len'"),
        (["--max-model-len", "x"], "--max-model-len"),
        (["--max-model-len"], "--max-model-len"),
        (["--prt", "1"], "did you mean '--port'"),
        (["--usp", "2"], "use --ulysses-degree"),
        (["--deploy-config", "x"], "use --stage-configs-path"),
        (["--use-hsdp"], "use --tensor-parallel-size"),
        (["--stage-overrides", "{"], "not JSON"),
        (["--lora-modules", "x=/none"], "no adapter_config.json"),
        (["--tool-call-parser", "hermes"], "needs enable_auto_tool_choice"),
        (["--enable-auto-tool-choice"], "needs tool_call_parser"),
        (["--compat", "other"], "upstream"),
        (["--api-key", ""], "api_key is empty"),
        (["--ssl-certfile", "/none"], "belong together"),
    ],
)
def test_wrong_options(words: list[str], said: str, started: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["serve", "model", *words]) == 2
    assert said in capsys.readouterr().err
    assert not started


def test_hints_are_for_what_is_not_there() -> None:
    """An option that has come since needs no hint."""
    app = typer.Typer()
    serve.register(app)
    command = typer.main.get_command(app)
    ours = {option for parameter in command.params for option in parameter.opts}
    assert not {f"--{name.replace('_', '-')}" for name in _FLAGS_INSTEAD} & ours
    for name in _FLAGS_INSTEAD:
        with pytest.raises(ConfigError) as caught:
            divide([f"--{name.replace('_', '-')}", "1"], ours)
        assert caught.value.details["field"] == name


def test_arguments_go_to_every_stage_that_has_them(tmp_path: Path) -> None:
    path = tmp_path / "stages.yaml"
    path.write_text(PLAIN)
    given = {"stage_configs_path": str(path), "max_model_len": 99, "stage_overrides": {1: {"max_model_len": 7}}}
    setup = resolve(given)
    first, second = setup.pipeline.stages
    assert (first.engine_args["max_model_len"], second.engine_args["max_model_len"]) == (99, 7)
    rows = {row[0]: row[2] for row in setup.rows()}
    assert rows["stage_args[0].engine_args.max_model_len"] == "Omni() argument"
    with pytest.raises(ConfigError, match="vae_use_tiling: no stage takes it"):
        resolve({**given, "vae_use_tiling": True})
    with pytest.raises(ConfigError, match="no stage '2'"):
        resolve({**given, "stage_overrides": {2: {}}})
    with pytest.raises(ConfigError, match="expected names and values"):
        resolve({**given, "stage_overrides": {1: 3}})


def test_settings_for_text_need_a_model_that_makes_it() -> None:
    from vllm_omni.entrypoints.openai.server import with_reasoning
    from vllm_omni.entrypoints.openai.text_args import TextArgs

    with pytest.raises(ConfigError, match="only for models whose prompt an engine of vLLM's reads"):
        with_reasoning(TextArgs(response_role="model"), {})
    for wrong in ({"reasoning_parser": "qwen33"}, {"chat_template": "/none/x.jinja"}):
        with pytest.raises(ConfigError) as caught:
            TextArgs(**wrong).check_parsers()  # type: ignore[arg-type]
        assert caught.value.details["field"] == next(iter(wrong))
