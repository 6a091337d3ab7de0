"""Qwen2.5-Omni on a GPU: vLLM's graphs, the flow's graphs and the kernels give the reference's speech."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.ar_support import StageSet
from tests.model_executor.qwen2_5_omni.support import Pipeline, Reference, make_prompt
from tests.model_executor.qwen2_5_omni.test_token2wav import some_codes, sound
from tests.model_executor.support import MODALITIES
from vllm_omni.model_executor.tiny_models.qwen2_5_omni import make_tiny_qwen2_5_omni

pytestmark = pytest.mark.gpu

TOKENS, CODES = 8, 30
STREAM = {
    "initial_codec_chunk_frames": 6,
    "codec_chunk_frames": 12,
    "codec_left_context_frames": 600,
    "codec_right_context_frames": 12,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen2_5_omni(tmp_path_factory.mktemp("qwen2_5_omni"))


@pytest.fixture(scope="module", params=[True, False], ids=["eager", "graphs"])
def pipeline(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[tuple[Pipeline, Reference]]:
    reference = Reference(checkpoint)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # the reference runs on the CPU in float32
    stages = StageSet()
    yield Pipeline(stages, checkpoint, reference.config, enforce_eager=request.param), reference
    stages.close()
    torch.backends.cudnn.allow_tf32 = allowed


def test_speech(pipeline: tuple[Pipeline, Reference]) -> None:
    """Text, codes and sound of a batch with every kind of input."""
    stages, reference = pipeline
    prompts = [make_prompt(reference.processor, [kind]) for kind in MODALITIES]
    for prompt, got in zip(prompts, stages.speak(prompts, TOKENS, CODES), strict=True):
        want = reference.speak(prompt, TOKENS, CODES)
        assert got.tokens == want.tokens
        assert got.codes == want.codes
        torch.testing.assert_close(got.wave.cpu(), want.wave, atol=1e-3, rtol=0)


def test_streamed_speech(pipeline: tuple[Pipeline, Reference]) -> None:
    """Text flows into the running talker and codes out of it: the same codes, and sound close to the whole's."""
    stages, reference = pipeline
    prompts = [make_prompt(reference.processor, [kind]) for kind in MODALITIES]
    whole = stages.speak(prompts, TOKENS, CODES)
    for got, want in zip(stages.speak(prompts, TOKENS, CODES, stream=True, extra=STREAM), whole, strict=True):
        assert got.tokens == want.tokens
        assert got.codes == want.codes
        assert got.wave.shape == want.wave.shape
        torch.testing.assert_close(got.wave, want.wave, atol=0.05, rtol=0)


def test_a_batch_of_windows_equals_each_alone(pipeline: tuple[Pipeline, Reference]) -> None:
    """Lengths on both sides of a block and of what is captured, of the flow and of the vocoder."""
    stages, reference = pipeline
    requests = [{"codes": some_codes(count, count), "speaker": "Ethan"} for count in (5, 12, 24, 30, 30, 48, 96)]
    for request, got in zip(requests, sound(stages.vocoder, requests), strict=True):
        (alone,) = sound(stages.vocoder, [request])
        torch.testing.assert_close(got, alone, atol=1e-3, rtol=0)
        torch.testing.assert_close(got.cpu(), reference.sound(request["codes"], "Ethan"), atol=1e-3, rtol=0)
