"""``Omni`` and ``AsyncOmni`` over stages on vLLM: one language model, started as users start it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from vllm.sampling_params import RequestOutputKind, SamplingParams

from tests.ar_models import save_lm
from tests.ar_support import SMALL
from tests.entrypoints.collector import Collector
from tests.entrypoints.test_tracing import check_nesting, coverage, load_cut, of, requests
from vllm_omni.engine.engine_pulse import EnginePulse
from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.errors import ConfigError, RequestError, StageDeadError

GREEDY = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}


def write(folder: Path, engine_args: dict[str, Any], **stage: Any) -> Path:
    row = {"stage_id": 0, "stage_type": "ar", "final_output": True, "final_output_type": "text", **stage}
    row.update(engine_args={**SMALL, **engine_args}, default_sampling_params=GREEDY)
    path = folder / "stages.yaml"
    path.write_text(yaml.safe_dump({"stage_args": [row]}))
    return path


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("omni_lm")
    return folder, save_lm(folder)


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("profiles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_TORCH_PROFILER_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """Takes spans over HTTP."""
    collector = Collector()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", collector.http_url)  # vLLM sets it; now it goes away again
        yield collector
    collector.close()


@pytest.fixture(scope="module")
def omni(lm: tuple[Path, Any], profiles: Path, collector: Collector) -> Iterator[Omni]:
    """Engine processes are spawned here, as they are for users."""
    traces = {"trace": str(lm[0] / "trace.json"), "otlp_traces_endpoint": collector.http_url}
    with Omni(str(lm[0]), stage_configs_path=str(write(lm[0], {})), stage_init_timeout=120, **traces) as omni:
        (pid,) = omni._async.orchestrator._clients[0].info.pids
        yield omni
    assert not os.path.exists(f"/proc/{pid}")


def expect(model: Any, ids: list[int]) -> list[int]:
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens


def test_generate(omni: Omni, lm: tuple[Path, Any]) -> None:
    prompts: list[Any] = ["say it again", {"prompt": "describe"}, {"prompt_token_ids": [4, 5, 6]}]
    outputs = omni.generate(prompts, use_tqdm=False)
    assert isinstance(outputs, list)
    assert len(outputs) == 3
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.finished
        assert output.is_pipeline_output
        assert (output.final_output_type, output.stage_id, output.prompt) == ("text", 0, prompt)
        ids = output.prompt_token_ids
        assert ids
        assert list(output.outputs[0].token_ids) == expect(lm[1], ids)
        assert output.request_output.request_id == output.request_id
        assert output.metrics["stages"]["0"]["run_s"] > 0


def test_bad_prompt_among_good(omni: Omni) -> None:
    with pytest.raises(RequestError) as caught:
        omni.generate(["say", {"prompt_token_ids": [1] * 500}, "it"], use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in caught.value.outputs] == [8, 8]
    assert omni.is_running


def test_sampling_params(omni: Omni) -> None:
    (output,) = omni.generate("say", SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3


def test_health_and_calls(omni: Omni) -> None:
    omni.check_health(timeout=30)
    assert omni.collective_rpc("omni_counts") == [{"requests": 0, "busy_segments": 0}]


def test_profile(omni: Omni, profiles: Path) -> None:
    omni.start_profile()
    omni.generate("say", use_tqdm=False)
    files = omni.stop_profile()
    assert files[0]
    for file in files[0]:
        assert Path(file).stat().st_size > 0
        assert Path(file).is_relative_to(profiles / "stage_0")


def test_streams_text(lm: tuple[Path, Any], omni: Omni) -> None:
    """The generator of ``py_generator`` yields text as it is made, in the form asked for."""
    delta = SamplingParams(**GREEDY, output_kind=RequestOutputKind.DELTA)
    parts = list(omni.generate("say", delta, py_generator=True, use_tqdm=False))
    (whole,) = omni.generate("say", use_tqdm=False)
    assert len(parts) == 8
    assert "".join(part.outputs[0].text for part in parts) == whole.outputs[0].text
    assert [part.finished for part in parts] == [False] * 7 + [True]


def test_wrong_settings(lm: tuple[Path, Any], tmp_path: Path) -> None:
    for change, words in (({"max_model_lenn": 5}, "did you mean"), ({"hidden_layers": [77]}, "allowed are")):
        with pytest.raises(ConfigError, match=words):
            Omni(str(lm[0]), stage_configs_path=str(write(tmp_path, change)))


def test_async(lm: tuple[Path, Any], omni: Omni) -> None:
    """A consumer that goes away in the middle frees the request, and the next one is right."""

    async def main(engine: AsyncOmni) -> None:
        long = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
        stream = engine.generate({"prompt_token_ids": [4, 5, 6]}, "leaves", long)
        async for output in stream:
            assert not output.finished
            break
        await stream.aclose()
        lengths = []
        async for output in engine.generate({"prompt_token_ids": [4, 5, 6]}, "stays"):
            lengths.append(len(output.outputs[0].token_ids))
        assert list(output.outputs[0].token_ids) == expect(lm[1], [4, 5, 6])
        assert lengths == list(range(1, 9))
        assert (await engine.collective_rpc("omni_counts"))[0]["requests"] <= 1
        await engine.check_health()

    omni._loop.run(main(omni._async))


def test_traces(omni: Omni, lm: tuple[Path, Any], collector: Collector) -> None:
    """Prompt, first token and batches of tokens in the file; vLLM's own span within that of the stage."""
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)

    async def ask() -> None:
        async for _ in omni._async.generate({"prompt_token_ids": [4, 5, 6]}, "traced", params, trace_headers=headers):
            pass

    omni._loop.run(ask())
    events = load_cut(lm[0] / "trace.json")
    check_nesting(events)
    request = next(r for r in requests(events) if r["args"]["request_id"] == "traced")
    parts = of(events, request)
    inner = [event for event in parts if event["name"] in ("prefill", "decode")]
    assert [event["name"] for event in inner] == ["prefill", "decode", "decode", "decode"]
    assert [event["args"]["tokens"] for event in inner] == [1, 16, 16, 7]
    assert coverage(events, request) >= 0.95
    (queue,) = (event for event in parts if event["name"] == "queue")
    (run,) = (event for event in parts if event["name"] == "run")
    assert queue["ts"] + queue["dur"] == pytest.approx(run["ts"], abs=0.01)
    deadline = time.monotonic() + 20
    while "llm_request" not in (spans := collector.trace(bytes.fromhex(trace_id))) or "omni_request" not in spans:
        assert time.monotonic() < deadline, list(spans)
        time.sleep(0.05)
    (root,), (own,) = spans["omni_request"], spans["llm_request"]
    (stage,) = (found[0] for name, found in spans.items() if name.startswith("stage 0"))
    assert root.parent_span_id.hex() == "b7ad6b7169203331"
    assert (stage.parent_span_id, own.parent_span_id) == (root.span_id, stage.span_id)
    facts = {fact.key: fact.value.int_value for fact in own.attributes}
    assert facts["gen_ai.usage.completion_tokens"] == 40
    assert "prefill" not in spans, "details only for those who ask"


def test_a_frozen_engine(lm: tuple[Path, Any], tmp_path: Path) -> None:
    """An engine of vLLM's that does not answer between its steps is given up; its request fails, nothing is left."""
    with Omni(str(lm[0]), stage_configs_path=str(write(tmp_path, {})), heartbeat_timeout=0, stall_timeout=2) as omni:
        (pid,) = omni._async.stage_infos[0].pids
        assert len(omni.generate("say", use_tqdm=False)) == 1
        os.kill(pid, signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(StageDeadError, match="has not moved"):
            omni.generate("say", use_tqdm=False, timeout=60)
        assert 2 <= time.monotonic() - begun < 5
        assert omni.errored
    assert not os.path.exists(f"/proc/{pid}")


async def test_beats_of_an_engine() -> None:
    """A process counts as long as it runs, and stands still when it is stopped."""
    with subprocess.Popen(["sleep", "60"]) as process:
        beats = EnginePulse(None, [process.pid])  # type: ignore[arg-type]
        name = f"process {process.pid}"
        first, second = (beats.vitals(busy=False).beats[name] for _ in range(2))
        assert first != second
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        first, second = (beats.vitals(busy=False).beats[name] for _ in range(2))
        assert first == second
        beats.kill()
        assert process.wait(10) == -signal.SIGKILL
