"""What is wrong with sampling parameters is said before they go to a stage, and the message names the field."""

from typing import Any

import pytest
import torch

from vllm_omni.errors import RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigmas": "abc"}, "sigmas='abc': expected a list of at least one number"),
        ({"sigmas": []}, "sigmas=[]: expected a list of at least one number"),
        ({"sigmas": ["a"]}, "sigmas=['a']"),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "num_inference_steps=3 but sigmas has 2 values"),
        ({"latents": [1]}, "latents are list; expected a tensor"),
        ({"generator": "x"}, "generator='x': expected a torch.Generator, or a list of them"),
        ({"generator": ["x"]}, "expected a torch.Generator, or a list of them"),
        ({"generator": [torch.Generator()], "num_outputs_per_prompt": 2}, "generator has 1 entries"),
        ({"generator_device": "tpu"}, "generator_device='tpu': allowed are cpu, cuda"),
        ({"output_type": "jpeg"}, "output_type='jpeg': allowed are pil, np, pt, latent"),
        ({"extra_args": [1]}, "extra_args=[1]: expected names and values"),
        ({"return_trajectory_latents": 1}, "return_trajectory_latents=1: expected bool"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: allowed is 0.0 to 100.0"),
        ({"height": "64"}, "height='64': expected int"),
        ({"seed": True}, "seed=True: expected int"),
    ],
)
def test_wrong_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        OmniDiffusionSamplingParams(**values).validate()
    assert message in caught.value.message
    assert caught.value.details["field"] in values


def test_right_values() -> None:
    generators = [torch.Generator(), torch.Generator()]
    OmniDiffusionSamplingParams().validate()
    OmniDiffusionSamplingParams(
        sigmas=(1, 0.5), num_inference_steps=2, generator=generators, num_outputs_per_prompt=2, latents=torch.zeros(1)
    ).validate()
