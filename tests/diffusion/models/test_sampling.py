"""Requests are checked once, against one table a model; what is not honoured is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.diffusion.parity import request
from vllm_omni.diffusion.models.common.flow_match import FlowSchedule
from vllm_omni.diffusion.models.common.sampling import checkpoint_defaults, resolve_request
from vllm_omni.diffusion.models.qwen_image.defaults import QWEN_IMAGE
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import ConfigError, RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

Pipes = Callable[[str], Any]


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"height": 72}, "height"),
        ({"width": 100}, "width"),
        ({"num_frames": 5}, "num_frames"),
        ({"fps": 24}, "fps"),
        ({"guidance_scale_2": 3.0}, "guidance_scale_2"),
        ({"lora_request": "adapter"}, "lora_request"),
        ({"lora_scale": 1.0}, "lora_scale"),
        ({"extra_args": {"cfg_renorm": True}}, "extra_args.cfg_renorm"),
        ({"max_sequence_length": 2000}, "max_sequence_length"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"sigmas": [1.0, 0.0]}, "sigmas"),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "sigmas"),
        ({"latents": torch.zeros(1, 3, 64)}, "latents"),
        ({"generator_device": "cuda"}, "generator_device"),
        ({"output_type": "jpeg"}, "output_type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(family: str, params: dict[str, Any], field: str, our_pipe: Pipes) -> None:
    if field == "generator_device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RequestError) as caught:
        our_pipe(family).check(request("a red fox", **params))
    assert caught.value.details["field"] == field
    assert field.split(".")[-1] in caught.value.message


@pytest.mark.parametrize(
    ("family", "params", "field"),
    [
        ("qwen-image", {"guidance_scale": 3.5}, "guidance_scale"),
        ("flux-schnell", {"guidance_scale": 3.5}, "guidance_scale"),
        ("flux-schnell", {"max_sequence_length": 300}, "max_sequence_length"),
        ("flux", {"negative": "blurry"}, "negative_prompt"),
    ],
)
def test_refused_by_one_model(family: str, params: dict[str, Any], field: str, our_pipe: Pipes) -> None:
    with pytest.raises(RequestError) as caught:
        our_pipe(family).check(request("a red fox", **params))
    assert caught.value.details["field"] == field


def test_zero_guidance_is_no_guidance(our_pipe: Pipes) -> None:
    """Model cards of distilled models say guidance_scale=0.0."""
    our_pipe("flux-schnell").check(request("a red fox", guidance_scale=0.0))


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (3, "prompt"),
        ({"prompt_token_ids": [1, 2]}, "prompt"),
        ({"prompt": "x", "negative_promt": "y"}, "negative_promt"),
        ({"prompt": "x", "multi_modal_data": {"image": 1}}, "multi_modal_data"),
        ({"prompt": "x", "negative_prompt": 5}, "negative_prompt"),
    ],
)
def test_prompts(prompt: Any, field: str, our_pipe: Pipes) -> None:
    with pytest.raises(RequestError) as caught:
        our_pipe("qwen-image").check(request(prompt))
    assert caught.value.details["field"] == field


def test_a_request_without_prompts_or_with_mixed_negatives(our_pipe: Pipes) -> None:
    params = request("x").sampling_params
    for prompts in ([], ["a", {"prompt": "b", "negative_prompt": "c"}]):
        with pytest.raises(RequestError):
            our_pipe("qwen-image").check(OmniDiffusionRequest(prompts, params))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("flux", (28, 3.5, 1.0, 512)),
        ("flux-schnell", (4, None, 1.0, 256)),
        ("qwen-image", (50, None, 4.0, 512)),
    ],
)
def test_defaults(family: str, expected: tuple[Any, ...], our_pipe: Pipes) -> None:
    pipe = our_pipe(family)
    given = OmniDiffusionRequest(["x"], OmniDiffusionSamplingParams())
    checked = pipe.check(given)
    params = checked.sampling_params
    assert (params.height, params.width) == (1024, 1024)
    names = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "max_sequence_length")
    assert tuple(getattr(params, name) for name in names) == expected
    assert isinstance(params.seed, int)
    assert pipe.check(checked) == checked
    assert given.sampling_params == OmniDiffusionSamplingParams()


def test_seeds(our_pipe: Pipes) -> None:
    """Drawn where none is given, the stage's default before that, and reported."""
    pipe = our_pipe("flux")
    drawn = {pipe.check(request("x")).sampling_params.seed for _ in range(4)}
    assert len(drawn) == 4
    before = pipe.od_config
    try:
        pipe.od_config = replace(before, default_seed=7)
        assert pipe.check(request("x")).sampling_params.seed == 7
    finally:
        pipe.od_config = before
    assert pipe.check(request("x", generator=torch.Generator())).sampling_params.seed is None
    assert pipe(request("x", num_inference_steps=1)).metrics["seed"] is not None


def test_arguments_of_forward(our_pipe: Pipes) -> None:
    """They replace those of the request; an unknown one is an error."""
    pipe = our_pipe("qwen-image")
    req = request("a dog", seed=1, output_type="latent")
    out = pipe(req, prompt="a red fox", negative_prompt="blurry", true_cfg_scale=3.0, seed=2).output
    same = request("a red fox", "blurry", true_cfg_scale=3.0, seed=2, output_type="latent")
    assert torch.equal(out, pipe(same).output)
    with pytest.raises(RequestError, match="unknown sampling parameter 'num_inference_step'"):
        pipe(req, num_inference_step=3)


def test_schedules_are_those_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    configs: list[dict[str, Any]] = [
        {"shift": 3.0, "use_dynamic_shifting": True},
        {"shift": 1.0},
        {"shift": 3.0},
        {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9, "max_image_seq_len": 8192},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    ]
    for config in configs:
        for steps, tokens, sigmas in ((4, 256, None), (50, 4096, None), (3, 1000, [1.0, 0.5, 0.2])):
            reference = FlowMatchEulerDiscreteScheduler(**config)
            ours = FlowSchedule.from_config(config)
            slope = (ours.max_shift - ours.base_shift) / (ours.max_image_seq_len - ours.base_image_seq_len)
            mu = tokens * slope + ours.base_shift - slope * ours.base_image_seq_len
            base = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
            reference.set_timesteps(sigmas=base, mu=mu)
            assert torch.equal(ours.levels(steps, tokens, sigmas), reference.sigmas)


@pytest.mark.parametrize(
    "config", [{"invert_sigmas": True}, {"_class_name": "UniPCMultistepScheduler"}, {"time_shift_type": "cubic"}]
)
def test_other_schedules_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        FlowSchedule.from_config(config)


def test_a_checkpoint_brings_its_own_defaults(tmp_path: Path) -> None:
    assert checkpoint_defaults(QWEN_IMAGE, tmp_path) is QWEN_IMAGE
    own = {"num_inference_steps": 20, "true_cfg_scale": 3.0, "negative_prompt": " ", "height": 128, "width": 96}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    defaults = checkpoint_defaults(QWEN_IMAGE, tmp_path)
    req = resolve_request(OmniDiffusionRequest(["a cup"], OmniDiffusionSamplingParams()), defaults, "model", 0)
    params = req.sampling_params
    assert (params.num_inference_steps, params.true_cfg_scale, params.height, params.width) == (20, 3.0, 128, 96)
    assert req.prompts == [{"prompt": "a cup", "negative_prompt": " "}]
    assert resolve_request(req, defaults, "model", 0).prompts == req.prompts
    given = OmniDiffusionRequest([{"prompt": "a cup", "negative_prompt": "fog"}], OmniDiffusionSamplingParams())
    assert resolve_request(given, defaults, "model", 0).negative_texts() == ["fog"]
    plain = OmniDiffusionRequest(["a cup"], OmniDiffusionSamplingParams(true_cfg_scale=1.0))
    assert resolve_request(plain, defaults, "model", 0).negative_texts() == [None]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"num_inference_step": 20}, "did you mean 'num_inference_steps'"),
        ({"guidance_scale": 2.0}, "unknown key 'guidance_scale'"),
        ({"height": 100}, "multiple of 16"),
        ({"true_cfg_scale": "high"}, "expected float"),
    ],
)
def test_a_checkpoint_s_wrong_defaults_are_named(tmp_path: Path, own: dict[str, Any], message: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    with pytest.raises(ConfigError, match=message):
        checkpoint_defaults(QWEN_IMAGE, tmp_path)
