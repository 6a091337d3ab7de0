"""The engine with one rank and the fake pipeline: steps, batches, cancels, deadlines, failures, memory."""

import itertools
import json
import time

import numpy as np
import pytest
import torch

from tests.diffusion.helpers import digest, drain, failures, fake_config, request, results
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.engine.stage_engine import StageInput, StageProgress
from vllm_omni.errors import DeadlineError, OutOfMemoryError, RequestError, StageError

MIX = {
    "a": {"seed": 1, "num_inference_steps": 3},
    "b": {"seed": 2, "num_inference_steps": 6, "guidance_scale": 0.5},
    "c": {"seed": 3, "num_inference_steps": 5, "guidance_scale": 2.0, "num_outputs_per_prompt": 2},
    "d": {"seed": 4, "num_inference_steps": 4, "height": 128, "width": 64},
}


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


@pytest.mark.parametrize(
    ("phase", "kind"),
    [
        *itertools.product(["encode", "denoise", "decode"], ["error", "oom", "request"]),
        ("check", "error"),
        ("check", "oom"),
    ],
)
def test_a_failure_concerns_its_request_alone(engine: DiffusionEngine, phase: str, kind: str) -> None:
    """The others of the batch come out with the same bits as ever."""
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
