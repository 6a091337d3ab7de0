"""The engine with the package's own models on tiny checkpoints: batches, ranks, custom pipelines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.diffusion.helpers import drain, failures, request, results
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.engine.stage_engine import StageProgress
from vllm_omni.errors import OutOfMemoryError, RequestError

CUSTOM = "tests.diffusion.custom_pipeline"
SIZE = {"height": 64, "width": 64}
MIX = {
    "a": {"seed": 1, "num_inference_steps": 3},
    "b": {"seed": 2, "num_inference_steps": 5, "num_outputs_per_prompt": 2},
    "c": {"seed": 3, "num_inference_steps": 4},
}
GUIDANCE = {"flux": ("guidance_scale", 1.5), "qwen-image": ("true_cfg_scale", 3.0)}


def make(folder: Path, **kwargs: Any) -> DiffusionEngine:
    return DiffusionEngine(OmniDiffusionConfig.from_kwargs(model=str(folder), device="cpu", dtype="float32", **kwargs))


def mixed(family: str) -> dict[str, dict[str, Any]]:
    """Requests of different prompts, seeds, steps, scales; with a negative prompt where the model uses one."""
    name, scale = GUIDANCE[family]
    made = {}
    for index, (key, params) in enumerate(MIX.items()):
        prompt: Any = " ".join(["a cup of coffee"] * (index + 1))
        if name == "true_cfg_scale":
            prompt = {"prompt": prompt, "negative_prompt": "blurry"}
        made[key] = {"prompt": prompt, **SIZE, **params, name: scale + index}
    return made


def pixels(data: dict[str, Any]) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=np.int16) for picture in data["images"]])


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
def test_a_mixed_batch_equals_each_alone(tiny_folder: Callable[[str], Path], family: str) -> None:
    engine = make(tiny_folder(family))
    alone, together = {}, {}
    for name, params in mixed(family).items():
        engine.add_request(request(name, output_type="latent", **params))
        alone.update(results(drain(engine)))
    for name, params in mixed(family).items():
        engine.add_request(request(name, output_type="latent", **params))
    events = drain(engine)
    together = results(events)
    assert not failures(events)
    for name, data in together.items():
        ours, theirs = data["latents"], alone[name]["latents"]
        assert ours.shape[0] == MIX[name].get("num_outputs_per_prompt", 1)
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5
        assert data["metrics"]["seed"] == MIX[name]["seed"]
        assert max(data["metrics"]["batch_sizes"]) == 3
    assert not torch.allclose(together["a"]["latents"], together["c"]["latents"], atol=1e-2)
    engine.close()


def test_pictures_and_bad_input(tiny_folder: Callable[[str], Path]) -> None:
    """Three requests decoded in one batch come out as each alone; a size the model cannot make is refused."""
    engine = make(tiny_folder("flux"))
    alone: dict[str, Any] = {}
    for name, params in mixed("flux").items():
        params = {**params, "num_inference_steps": 3}
        engine.add_request(request(name, **params))
        alone.update(results(drain(engine)))
    for name, params in mixed("flux").items():
        engine.add_request(request(name, **{**params, "num_inference_steps": 3}))
    engine.add_request(request("bad", height=63, width=64))
    events = drain(engine)
    assert isinstance(failures(events)["bad"], RequestError)
    for name, data in results(events).items():
        assert np.abs(pixels(data) - pixels(alone[name])).max() <= 1
        assert pixels(data).shape[1:] == (64, 64, 3)
    engine.close()


def test_flux_on_two_ranks_makes_the_picture_of_one(tiny_folder: Callable[[str], Path]) -> None:
    """Also after one rank alone ran out of memory between two collectives of the transformer."""
    folder = tiny_folder("flux")
    got = []
    custom = {"diffusion_load_format": "dummy", "custom_pipeline_args": {"pipeline_class": f"{CUSTOM}.RunsOut"}}
    for kwargs in ({}, {"tensor_parallel_size": 2, **custom}):
        engine = make(folder, **kwargs)
        for name, params in mixed("flux").items():
            engine.add_request(request(name, **params))
        events = drain(engine)
        assert not failures(events)
        got.append(results(events))
        if kwargs:
            engine.add_request(request("boom", "boom", **SIZE, num_inference_steps=2))
            assert type(failures(drain(engine))["boom"]) is OutOfMemoryError
            for name, params in mixed("flux").items():
                engine.add_request(request(name, **params))
            got.append(results(drain(engine)))
        engine.close()
    for name in MIX:
        assert np.abs(pixels(got[0][name]) - pixels(got[1][name])).max() <= 1
        assert np.abs(pixels(got[1][name]) - pixels(got[2][name])).max() <= 1


def test_the_guide_s_custom_pipeline_on_one_and_two_ranks(tiny_folder: Callable[[str], Path]) -> None:
    """Loaded with ``dummy`` and ``custom_pipeline_args``: the model's real weights, the user's ``forward``."""
    folder = tiny_folder("qwen-image")
    prompt = {"prompt": "a cup of coffee", "negative_prompt": "blurry"}
    params = {**SIZE, "num_inference_steps": 5, "true_cfg_scale": 4.0, "seed": 1}
    plain = make(folder)
    plain.add_request(request("x", prompt, **params))
    (expected,) = results(drain(plain)).values()
    plain.close()
    custom = {"pipeline_class": f"{CUSTOM}.CustomPipeline"}
    for ranks in (1, 2):
        engine = make(folder, diffusion_load_format="dummy", custom_pipeline_args=custom, tensor_parallel_size=ranks)
        assert engine.info().name == "CustomPipeline"
        for name in ("x", "y"):
            engine.add_request(request(name, prompt, **params))
        events = drain(engine)
        assert not failures(events)
        assert not [event for event in events if isinstance(event, StageProgress)]
        for data in results(events).values():
            assert data["metrics"]["trajectory_timesteps"].shape == (5,)
            assert data["metrics"]["seed"] == 1
            assert data["latents"].shape == (5, 1, 16, 64, 64)
            assert np.abs(pixels(data) - pixels(expected)).max() <= 1
        engine.close()


def test_a_custom_pipeline_without_its_own_forward_runs_by_steps(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """And a profile of it holds the denoise steps; its pipeline can be replaced while it runs."""
    engine = make(
        tiny_folder("qwen-image"),
        diffusion_load_format="dummy",
        custom_pipeline_args={"pipeline_class": f"{CUSTOM}.Inherited"},
    )
    engine.start_profile(str(tmp_path))
    engine.add_request(request("x", "a cup", **SIZE, seed=1, num_inference_steps=2))
    events = drain(engine)
    (path,) = engine.stop_profile()
    names = [event["name"] for event in json.loads(Path(path).read_text())["traceEvents"]]
    assert names.count("omni.denoise") >= 2
    assert [event.step for event in events if isinstance(event, StageProgress)] == [1, 2]
    (data,) = results(events).values()
    plain = make(tiny_folder("qwen-image"))
    for name, prompt in (("same", "a cup at night"), ("other", "a cup")):
        plain.add_request(request(name, prompt, **SIZE, seed=1, num_inference_steps=2))
    made = results(drain(plain))
    plain.close()
    engine.close()
    assert np.abs(pixels(data) - pixels(made["same"])).max() <= 1
    assert np.abs(pixels(data) - pixels(made["other"])).max() > 1
