"""Qwen3-Omni on a GPU: vLLM's graphs, the code predictor's graphs and the kernels give the reference's speech."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.ar_support import StageSet
from tests.model_executor.qwen3_omni.support import MODALITIES, Pipeline, Reference, make_prompt
from vllm_omni.model_executor.tiny_models.qwen3_omni import make_tiny_qwen3_omni

pytestmark = pytest.mark.gpu

TOKENS, FRAMES = 8, 16
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""As the stage configurations have it for the talker."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3_omni(tmp_path_factory.mktemp("qwen3_omni"), seed=2)


@pytest.fixture(scope="module", params=[True, False], ids=["eager", "graphs"])
def pipeline(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[tuple[Pipeline, Reference]]:
    reference = Reference(checkpoint)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # the reference runs on the CPU in float32
    stages = StageSet()
    talker = {} if request.param else {"compilation_config": GRAPHS}
    yield Pipeline(stages, checkpoint, reference.config, enforce_eager=request.param, **talker), reference
    stages.close()
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_speech(pipeline: tuple[Pipeline, Reference], stream: bool) -> None:
    """Text, codes and sound of a batch with every kind of input."""
    stages, reference = pipeline
    prompts = [make_prompt(reference.processor, kind) for kind in MODALITIES]
    extra = {"initial_codec_chunk_frames": 2, "codec_chunk_frames": 6}
    for prompt, got in zip(prompts, stages.speak(prompts, TOKENS, FRAMES, stream=stream, extra=extra), strict=True):
        want = reference.speak(prompt, TOKENS, FRAMES)
        assert got.tokens == want.tokens
        assert torch.equal(got.codes.long().cpu(), want.codes)
        torch.testing.assert_close(got.wave.cpu(), want.wave, atol=1e-3, rtol=0)


def test_the_code_predictor_is_captured(pipeline: tuple[Pipeline, Reference]) -> None:
    stages, _ = pipeline
    eager = stages.talker.config.model_config.enforce_eager
    assert stages.talker.model._predict.sizes == ([] if eager else [1, 2, 4, 8])


def test_a_batch_of_windows_equals_each_alone(pipeline: tuple[Pipeline, Reference]) -> None:
    """Windows of many lengths share a step of the vocoder."""
    stages, reference = pipeline
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(0, 128, (frames, 16), generator=generator) for frames in (1, 4, 8, 9, 16, 25, 70)]
    prompts = [{"additional_information": {"codes": codes.int()}} for codes in windows]
    for codes, prompt, result in zip(windows, prompts, stages.code2wav.ask(prompts), strict=True):
        assert result.error is None
        got = result.payloads[0]["audio"]
        torch.testing.assert_close(got, stages.code2wav.ask([prompt])[0].payloads[0]["audio"], atol=1e-3, rtol=0)
        with torch.inference_mode():
            want = reference.model.code2wav(codes.T[None])[0, 0]
        torch.testing.assert_close(got.cpu(), want, atol=1e-3, rtol=0)
