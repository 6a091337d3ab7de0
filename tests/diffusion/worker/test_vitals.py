"""Layers say that they get on; a step of a real pipeline says it many times."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from vllm_omni import pulse
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.vitals import report_progress
from vllm_omni.inputs.data import OmniDiffusionSamplingParams


class Model(nn.Module):
    """Layers within layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])])


def test_layers_are_found() -> None:
    assert report_progress(Model(), compiled=False) == 3
    assert report_progress(object(), compiled=False) == 0


def test_a_step_tells_of_every_block(our_pipe: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do the text encoders and the VAE, which are other libraries'; compiled blocks do not."""
    pipe = our_pipe("flux")
    compiled = report_progress(pipe, compiled=True)
    told: list[int] = []
    monkeypatch.setattr(pulse, "advance", lambda: told.append(1))
    params = OmniDiffusionSamplingParams(height=32, width=32, num_inference_steps=1, seed=0)
    req = pipe.check(OmniDiffusionRequest(["a cup"], params))
    state = pipe.prepare(req, pipe.encode(req))
    after_encode = len(told)
    pipe.diffuse(state)
    assert len(told) == after_encode, "compiled blocks tell nothing"
    pipe.decode(state)
    assert 0 < after_encode < len(told)
    assert report_progress(pipe, compiled=False) > compiled
    told.clear()
    pipe.diffuse(pipe.prepare(req, pipe.encode(req)))
    blocks = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    assert len(told) >= blocks
