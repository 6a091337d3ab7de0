"""Pictures that would hold a stage up for minutes are refused before they cost anything."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import ConfigError, RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams


def check(pipe: Any, **params: Any) -> None:
    pipe.check(OmniDiffusionRequest(["a cup"], OmniDiffusionSamplingParams(seed=0, **params)))


def test_the_model_decides(our_pipe: Callable[[str], Any]) -> None:
    """16 times its own picture (1024 x 1024), and four times that in all."""
    pipe = our_pipe("flux")
    check(pipe, height=4096, width=4096, num_outputs_per_prompt=4)
    check(pipe, num_outputs_per_prompt=64)
    for sides in ((16384, 16384), (4096, 4112), (16384, 1040)):
        with pytest.raises(RequestError, match=r"a picture may have 16777216 \(max_pixels\)") as caught:
            check(pipe, width=sides[0], height=sides[1])
        assert caught.value.details["field"] == "height"
    with pytest.raises(RequestError, match="67108864 pixels in all") as caught:
        check(pipe, height=4096, width=4096, num_outputs_per_prompt=5)
    assert caught.value.details["field"] == "num_outputs_per_prompt"


def test_the_configuration_decides(our_pipe: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = our_pipe("flux")
    monkeypatch.setattr(pipe, "od_config", replace(pipe.od_config, max_pixels=256 * 256))
    check(pipe, height=256, width=256)
    with pytest.raises(RequestError, match="may have 65536"):
        check(pipe, height=256, width=272)
    monkeypatch.setattr(pipe, "od_config", replace(pipe.od_config, max_pixels=16384 * 16384))
    check(pipe, height=16384, width=16384)
    with pytest.raises(ConfigError, match="max_pixels"):
        OmniDiffusionConfig.from_kwargs(model="m", max_pixels=0)
