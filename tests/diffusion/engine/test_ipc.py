"""Messages survive the way to a rank and back, tensors without being pickled."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from vllm_omni.diffusion import ipc
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.inputs.data import OmniDiffusionSamplingParams


def through(message: object) -> object:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        ipc.send(ours, message)
        return ipc.receive(theirs)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.arange(12).view(3, 4).t(),
        torch.tensor([True, False]),
    ],
)
def test_tensors(tensor: torch.Tensor) -> None:
    got = through({"t": tensor})["t"]
    assert got.dtype == tensor.dtype
    assert got.shape == tensor.shape
    assert torch.equal(got, tensor)


def test_a_tensor_travels_beside_the_pickle() -> None:
    parts = ipc.encode({"t": torch.zeros(1000, 1000)})
    assert len(parts[0]) < 500
    assert parts[1].nbytes == 4_000_000


def test_plan_with_a_request() -> None:
    generator = torch.Generator().manual_seed(7)
    params = OmniDiffusionSamplingParams(generator=generator, latents=torch.ones(1, 4, 2))
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    req = OmniDiffusionRequest([{"prompt": "a", "multi_modal_data": {"image": picture}}], params, ["r"])
    got = through(ipc.StepPlan(new=(req,), kind="encode", request_ids=("r",)))
    assert got.kind == "encode"
    got_req = got.new[0]
    assert torch.equal(torch.rand(3, generator=got_req.sampling_params.generator), torch.rand(3, generator=generator))
    assert got_req.media("image")[0].tobytes() == picture.tobytes()
    assert torch.equal(got_req.sampling_params.latents, torch.ones(1, 4, 2))


def test_the_other_side_gone() -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(OSError, match="Broken pipe"):
        ipc.send(ours, ipc.Stop())
    with pytest.raises(EOFError):
        ipc.receive(ours)


def test_what_cannot_be_pickled_is_an_error_before_anything_is_sent() -> None:
    ours, theirs = multiprocessing.Pipe()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        ipc.send(ours, lambda: None)
    assert not theirs.poll(0)
