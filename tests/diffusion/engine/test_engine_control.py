"""The engine beside its steps: whole pipelines, profiles, calls, settings, closing, overhead."""

import json
import time
from pathlib import Path

import pytest

from tests.diffusion.helpers import FAKE, digest, drain, failures, fake_config, request, results
from vllm_omni.diffusion import registry
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.engine.stage_engine import StageChunk, StageFailure
from vllm_omni.errors import ConfigError, RequestError, StageDeadError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams


def test_generate(engine: DiffusionEngine) -> None:
    params = OmniDiffusionSamplingParams(seed=3)
    chunks = engine.generate([OmniDiffusionRequest(["a", "b"], params), OmniDiffusionRequest(["a"], params, ["x"])])
    assert [len(chunk.data["images"]) for chunk in chunks] == [1, 1, 1]
    assert chunks[2].request_id == "x"
    assert digest(chunks[0].data) == digest(chunks[2].data) != digest(chunks[1].data)
    with pytest.raises(RequestError, match="divisible"):
        engine.generate([OmniDiffusionRequest(["a", "b"], OmniDiffusionSamplingParams(height=63))])


def test_whole_pipelines_run_one_by_one() -> None:
    engine = DiffusionEngine(fake_config("WholePipeline"))
    assert engine.info().facts["by_steps"] is False
    for name in ("a", "b", "report"):
        engine.add_request(request(name, prompt=name, seed=1))
    events = drain(engine)
    out = results(events)
    assert out["a"]["metrics"]["trajectory_timesteps"].shape == (5,)
    assert out["a"]["metrics"]["made_by"] == "WholePipeline"
    assert out["a"]["metrics"]["seed"] == 1
    assert 0 < out["a"]["metrics"]["run_s"] <= out["a"]["metrics"]["total_s"]
    assert out["a"]["latents"].shape == (5, 1, 2)
    assert digest(out["a"]) != digest(out["b"])
    assert "reports an error" in failures(events)["report"].message
    engine.close()


def test_profile(engine: DiffusionEngine, tmp_path) -> None:
    with pytest.raises(RequestError, match="start_profile first"):
        engine.stop_profile()
    engine.start_profile(str(tmp_path / "traces"))
    engine.add_request(request("a"))
    drain(engine)
    (path,) = engine.stop_profile()
    events = json.loads(Path(path).read_text())["traceEvents"]
    names = [event["name"] for event in events]
    assert names.count("omni.denoise") >= 4
    assert {"omni.encode", "omni.decode"} <= set(names)


def test_calls(engine: DiffusionEngine) -> None:
    assert engine.call("whoami", ("rank ",)) == ["rank 0"]
    assert engine.call("whoami", (), {"prefix": "r"}) == ["r0"]
    with pytest.raises(RequestError, match="no method 'nothing'"):
        engine.call("nothing")
    with pytest.raises(RequestError, match="no method '_unit_error'"):
        engine.call("_unit_error")
    with pytest.raises(ValueError, match="the extension failed"):
        engine.call("explode")


def test_the_pipeline_can_be_replaced_between_requests() -> None:
    engine = DiffusionEngine(fake_config())
    engine.add_request(request("a"))
    with pytest.raises(RequestError, match="1 requests are open"):
        engine.call("re_init_pipeline", ({"pipeline_class": f"{FAKE}.WholePipeline"},))
    drain(engine)
    engine.call("re_init_pipeline", ({"pipeline_class": f"{FAKE}.WholePipeline"},))
    assert engine.info().name == "WholePipeline"
    engine.add_request(request("a"))
    assert results(drain(engine))["a"]["metrics"]["made_by"] == "WholePipeline"
    engine.close()


def test_the_model_s_pre_processing_runs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the registry's, takes and returns a list of requests, and may refuse one."""

    def pre_process(requests: list[OmniDiffusionRequest]) -> list[OmniDiffusionRequest]:
        (req,) = requests
        if req.texts() == ["bad"]:
            raise RequestError("needs an image", field="multi_modal_data.image")
        return [OmniDiffusionRequest([req.texts()[0] + " processed"], req.sampling_params, req.request_ids)]

    monkeypatch.setattr(registry, "get_diffusion_pre_process_func", lambda od_config: pre_process)
    engine = DiffusionEngine(fake_config())
    engine.add_request(request("a", "x", seed=1))
    engine.add_request(request("bad", "bad"))
    events = drain(engine)
    assert failures(events)["bad"].details["field"] == "multi_modal_data.image"
    engine.close()
    monkeypatch.undo()
    plain = DiffusionEngine(fake_config())
    plain.add_request(request("b", "x processed", seed=1))
    assert digest(results(events)["a"]) == digest(results(drain(plain))["b"])
    plain.close()


def test_close_is_idempotent_and_final() -> None:
    engine = DiffusionEngine.from_config(
        3,
        {
            "model": "fake",
            "model_class_name": "FluxPipeline",
            "device": "cpu",
            "custom_pipeline_args": {"pipeline_class": f"{FAKE}.FakePipeline"},
        },
    )
    engine.add_request(request("a"))
    engine.step()
    engine.check_health()
    engine.close()
    engine.close()
    with pytest.raises(StageDeadError):
        engine.check_health()


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"devices": "0,1"}, "devices"),
        ({"devices": "x"}, "devices"),
        ({"custom_pipeline_args": {"pipeline_class": f"{FAKE}.Missing"}}, "custom_pipeline_args"),
        ({"worker_extension_cls": f"{FAKE}.Conflicting"}, "worker_extension_cls"),
        ({"worker_extension_cls": "nowhere.Class"}, "worker_extension_cls"),
        ({"ulysses_degree": 2}, "ulysses_degree"),
    ],
)
def test_settings_that_cannot_be_honoured(kwargs: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DiffusionEngine(fake_config(**kwargs))
    assert caught.value.details["field"] == field


def test_overhead_of_a_step(engine: DiffusionEngine) -> None:
    """Scheduler and engine together, a hundred requests open: what a step costs beside the pipeline."""
    for index in range(100):
        engine.add_request(request(f"r{index}", num_inference_steps=20, height=64 + 8 * (index % 10)))
    for _ in range(30):
        engine.step()
    spent = 0.0
    executor = engine._executor
    execute = executor.execute

    def timed(plan):
        nonlocal spent
        started = time.process_time()
        result = execute(plan)
        spent += time.process_time() - started
        return result

    executor.execute = timed
    started = time.process_time()
    for _ in range(200):
        engine.step()
    total = time.process_time() - started
    executor.execute = execute
    engine.abort([f"r{index}" for index in range(100)])
    events = drain(engine)
    assert not [event for event in events if isinstance(event, (StageChunk, StageFailure))]
    assert (total - spent) / 200 < 100e-6
