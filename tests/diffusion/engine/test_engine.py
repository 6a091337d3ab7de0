"""The engine with one rank and the fake pipeline: steps, batches, cancels, deadlines, failures."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.diffusion.helpers import FAKE, digest, drain, failures, fake_config, request, results
from vllm_omni.diffusion import registry
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.engine.stage_engine import StageChunk, StageFailure, StageInput, StageProgress
from vllm_omni.errors import ConfigError, DeadlineError, OutOfMemoryError, RequestError, StageDeadError, StageError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

MIX = {
    "a": {"seed": 1, "num_inference_steps": 3},
    "b": {"seed": 2, "num_inference_steps": 6, "guidance_scale": 0.5},
    "c": {"seed": 3, "num_inference_steps": 5, "guidance_scale": 2.0, "num_outputs_per_prompt": 2},
    "d": {"seed": 4, "num_inference_steps": 4, "height": 128, "width": 64},
}


@pytest.fixture(scope="module")
def engine() -> Iterator[DiffusionEngine]:
    engine = DiffusionEngine(fake_config(max_num_seqs=4))
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the shared engine holds no request, on either side."""
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        assert not engine.has_work()
        assert engine.call("held") == [[]]


def test_info(engine: DiffusionEngine) -> None:
    info = engine.info()
    assert info.name == "FakePipeline"
    assert info.ranks == 1
    assert info.pids == []
    assert info.facts["device"] == "cpu"
    assert info.facts["weight_bytes"] == 12
    json.dumps(info.facts)


def test_events_of_one_request(engine: DiffusionEngine) -> None:
    engine.add_request(request("a", seed=5, num_inference_steps=3))
    events = drain(engine)
    progress = [(e.step, e.total) for e in events if isinstance(e, StageProgress)]
    assert progress == [(1, 3), (2, 3), (3, 3)]
    (data,) = results(events).values()
    assert events[-1].finished
    (picture,) = data["images"]
    assert picture.size == (64, 64)
    metrics = data["metrics"]
    assert metrics["seed"] == 5
    assert metrics["num_inference_steps"] == 3
    assert metrics["batch_sizes"] == [1]
    phases = [metrics[key] for key in ("queue_s", "encode_s", "denoise_s", "decode_s")]
    assert all(seconds >= 0 for seconds in phases)
    assert sum(phases) == pytest.approx(metrics["total_s"], abs=1e-6)
    json.dumps(metrics)


def test_batched_mix_equals_each_alone_bit_by_bit(engine: DiffusionEngine) -> None:
    alone = {}
    for name, params in MIX.items():
        engine.add_request(request(name, prompt=name, **params))
        alone.update(results(drain(engine)))
    for name, params in MIX.items():
        engine.add_request(request(name, prompt=name, **params))
    together = results(drain(engine))
    assert {name: digest(data) for name, data in together.items()} == {n: digest(d) for n, d in alone.items()}
    assert len({digest(data) for data in together.values()}) == len(MIX)
    assert together["a"]["metrics"]["batch_sizes"] == [3]
    assert max(together["b"]["metrics"]["batch_sizes"]) == 3
    assert len(together["c"]["images"]) == 2


def test_a_request_joins_and_leaves_between_steps(engine: DiffusionEngine) -> None:
    before = len(engine.call("batches")[0])
    engine.add_request(request("long", num_inference_steps=6))

    def join(step: int) -> None:
        if step == 3:
            engine.add_request(request("short", num_inference_steps=2))

    drain(engine, join)
    batches = engine.call("batches")[0][before:]
    assert batches[:2] == [[("long", 0)], [("long", 1)]]
    assert [("long", 2), ("short", 0)] in batches or [("long", 3), ("short", 0)] in batches
    assert batches[-1] == [("long", 5)]


def test_seed(engine: DiffusionEngine) -> None:
    """Without a seed one is drawn, used and reported; a generator draws what its seed would."""
    engine.add_request(request("drawn"))
    engine.add_request(request("other"))
    out = results(drain(engine))
    seed = out["drawn"]["metrics"]["seed"]
    assert seed != out["other"]["metrics"]["seed"]
    engine.add_request(request("again", seed=seed))
    engine.add_request(request("generator", generator=torch.Generator().manual_seed(seed)))
    same = results(drain(engine))
    assert digest(same["again"]) == digest(same["generator"]) == digest(out["drawn"]) != digest(out["other"])


@pytest.mark.parametrize("output_type", ["np", "pt", "latent"])
def test_output_types(engine: DiffusionEngine, output_type: str) -> None:
    engine.add_request(request("pil", seed=1))
    engine.add_request(request("x", seed=1, output_type=output_type))
    out = results(drain(engine))
    pixels = np.asarray(out["pil"]["images"][0], dtype=np.float32) / 255
    if output_type == "latent":
        assert out["x"]["images"] == []
        assert out["x"]["latents"].shape == (1, 64, 3)
        return
    (picture,) = out["x"]["images"]
    picture = np.asarray(picture) if output_type == "np" else picture.permute(1, 2, 0).numpy()
    assert picture.dtype == np.float32
    assert np.abs(picture - pixels).max() <= 0.5 / 255 + 1e-6


def test_trajectory(engine: DiffusionEngine) -> None:
    engine.add_request(request("t", num_inference_steps=3, return_trajectory_latents=True))
    (data,) = results(drain(engine)).values()
    assert data["latents"].shape == (3, 1, 64, 3)
    assert data["metrics"]["trajectory_timesteps"].shape == (3,)


@pytest.mark.parametrize("phase", ["queued", "encoded", "denoising", "failed"])
def test_abort(engine: DiffusionEngine, phase: str) -> None:
    """No event follows an abort, others are not disturbed, and the ranks forget the request."""
    engine.add_request(request("keep", seed=1))
    engine.add_request(request("gone", height=63 if phase == "failed" else None))
    for _ in range({"queued": 0, "encoded": 1, "denoising": 2, "failed": 0}[phase]):
        engine.step()
    engine.abort(["gone", "unknown"])
    engine.abort(["gone"])
    events = drain(engine)
    assert {event.request_id for event in events} == {"keep"}


def test_an_id_can_be_used_again_at_once(engine: DiffusionEngine) -> None:
    engine.add_request(request("x", seed=1))
    for _ in range(3):
        engine.step()
    engine.abort(["x"])
    engine.add_request(request("x", seed=2))
    first = results(drain(engine))
    engine.add_request(request("y", seed=2))
    assert digest(first["x"]) == digest(results(drain(engine))["y"])


@pytest.mark.parametrize(("steps_before", "phase"), [(0, "queue"), (2, "denoise")])
def test_deadline(engine: DiffusionEngine, monkeypatch: pytest.MonkeyPatch, steps_before: int, phase: str) -> None:
    now = time.monotonic()
    engine.add_request(request("late", deadline=now + 1000, num_inference_steps=8))
    engine.add_request(request("fine"))
    events = []
    for _ in range(steps_before):
        events += engine.step()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1001)
    events += drain(engine)
    error = failures(events)["late"]
    assert isinstance(error, DeadlineError)
    assert error.details["phase"] == phase
    assert error.details["stage_id"] == 0
    assert "fine" in results(events)


BAD = [
    ({"prompt": 3}, "prompt"),
    ({"prompt": {"prompt": "a", "negativ_prompt": "b"}}, "prompt.negativ_prompt"),
    ({"prompt": {"prompt": ["a"]}}, "prompt.prompt"),
    ({"height": 63}, "height"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"output_type": "jpg"}, "output_type"),
]


@pytest.mark.parametrize(("bad", "field"), BAD)
def test_bad_input_fails_that_request_alone(engine: DiffusionEngine, bad: dict, field: str) -> None:
    engine.add_request(request("good"))
    engine.add_request(request("bad", **bad))
    events = drain(engine)
    error = failures(events)["bad"]
    assert isinstance(error, RequestError)
    assert error.details["field"] == field
    assert "good" in results(events)


def test_other_wrong_requests(engine: DiffusionEngine) -> None:
    engine.add_request(StageInput("chunk", "a", None, chunk=1))
    engine.add_request(StageInput("params", "a", 3))
    engine.add_request(StageInput("name", "a", {"hight": 64}))
    errors = failures(drain(engine))
    assert {name: error.details["field"] for name, error in errors.items()} == {
        "chunk": "chunk",
        "params": "sampling_params",
        "name": "hight",
    }
    assert "did you mean 'height'" in errors["name"].message


@pytest.mark.parametrize("phase", ["check", "encode", "denoise", "decode"])
@pytest.mark.parametrize("kind", ["error", "oom", "request"])
def test_a_failure_concerns_its_request_alone(engine: DiffusionEngine, phase: str, kind: str) -> None:
    """The others of the batch come out with the same bits as ever."""
    if (phase, kind) == ("check", "request"):
        pytest.skip("test_bad_input_fails_that_request_alone")
    engine.add_request(request("a", seed=1))
    expected = digest(results(drain(engine))["a"])
    fail = {"phase": phase, "kind": kind, **({"step": 2} if phase == "denoise" else {})}
    engine.add_request(request("a", seed=1))
    engine.add_request(request("bad", extra_args={"fail": fail}))
    engine.add_request(request("b", seed=1))
    events = drain(engine)
    out = results(events)
    assert digest(out["a"]) == digest(out["b"]) == expected
    error = failures(events)["bad"]
    assert type(error) is {"error": StageError, "oom": OutOfMemoryError, "request": RequestError}[kind]
    if kind != "request":
        assert error.details["phase"] == phase
        assert "fake_pipeline.py" in error.details["cause"]
    if kind == "error":
        assert "made to fail by the test" in error.message
    assert set(out) == {"a", "b"}


def test_a_batch_out_of_memory_is_tried_again_one_by_one() -> None:
    """Each alone fits, three together do not: all succeed, and later batches are smaller."""
    engine = DiffusionEngine(fake_config(max_num_seqs=4))
    fail = {"phase": "denoise", "kind": "oom", "over": 2}
    for name in "abc":
        engine.add_request(request(name, seed=1, extra_args={"fail": fail}))
    events = drain(engine)
    assert set(results(events)) == set("abc")
    assert len({digest(data) for data in results(events).values()}) == 1
    before = len(engine.call("batches")[0])
    for name in "abc":
        engine.add_request(request(name, seed=1, extra_args={"fail": fail}))
    assert set(results(drain(engine))) == set("abc")
    assert max(len(batch) for batch in engine.call("batches")[0][before:]) == 1
    engine.close()


def test_token_budget_queues_and_refuses() -> None:
    """Two pictures of 64 tokens fit a step together, three do not, and one of 256 never does."""
    engine = DiffusionEngine(fake_config(max_num_seqs=4, max_num_batched_tokens=128))
    for name in "abc":
        engine.add_request(request(name))
    engine.add_request(request("big", height=128, width=128))
    events = drain(engine)
    assert set(results(events)) == set("abc")
    assert {size for data in results(events).values() for size in data["metrics"]["batch_sizes"]} == {1, 2}
    error = failures(events)["big"]
    assert isinstance(error, OutOfMemoryError)
    assert "256 latent tokens" in error.message
    assert not [e for e in events if isinstance(e, StageProgress) and e.request_id == "big"]
    engine.close()


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
