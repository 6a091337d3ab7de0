"""Pictures made in two halves (device, host) are those that ``postprocess_images`` makes in one."""

import numpy as np
import pytest
import torch
from PIL import Image

from vllm_omni.diffusion.data import DiffusionOutput
from vllm_omni.diffusion.models.common.images import postprocess_images
from vllm_omni.diffusion.worker.outputs import start_images


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def images(request: pytest.FixtureRequest) -> torch.Tensor:
    return (torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 1.2).to(request.param)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("registered", [None, postprocess_images])
def test_two_halves(images: torch.Tensor, output_type: str, registered: object) -> None:
    host, finish = start_images(DiffusionOutput(images), output_type, registered)
    assert host is not None
    made = finish(host)
    expected = list(postprocess_images(images, output_type))
    assert len(made) == 2
    for ours, theirs in zip(made, expected, strict=True):
        if output_type == "pil":
            assert isinstance(ours, Image.Image)
        ours, theirs = (x.float().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in (ours, theirs))
        assert np.array_equal(ours, theirs)


def test_a_pipeline_s_own_function_goes_first(images: torch.Tensor) -> None:
    out = DiffusionOutput(images, post_process_func=lambda tensor: ["own"] * len(tensor))
    host, finish = start_images(out, "pil", lambda tensor: ["registered"] * len(tensor))
    assert finish(host) == ["own", "own"]
    host, finish = start_images(DiffusionOutput(images), "pil", lambda tensor: ["registered"] * len(tensor))
    assert finish(host) == ["registered", "registered"]


def test_no_output() -> None:
    host, _ = start_images(DiffusionOutput(), "pil", None)
    assert host is None
