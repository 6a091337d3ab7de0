"""Qwen3-Omni on a GPU: vLLM's graphs, the code predictor's graphs and the kernels give the reference's speech."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.ar_support import StageSet
from tests.model_executor.qwen3_omni.support import Pipeline, Reference, make_prompt
from tests.model_executor.support import MODALITIES
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.model_executor.tiny_models.qwen3_omni import make_tiny_qwen3_omni
from vllm_omni.model_executor.tiny_models.stages import tiny_stages

pytestmark = pytest.mark.gpu

TOKENS, FRAMES = 8, 16
GRAPHS: dict[str, dict[str, Any]] = {"compiled": {}, "graphs": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3_omni(tmp_path_factory.mktemp("qwen3_omni"), seed=2)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture(scope="module", params=list(GRAPHS))
def omni(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Omni]:
    """The packaged stages, each in its process: captured mixture-of-experts layers of two engines in one process would
    write into one workspace."""
    values = tiny_stages(checkpoint)
    for stage, limit in zip(values["stage_args"], (TOKENS, FRAMES), strict=False):
        stage["default_sampling_params"] |= {"temperature": 0.0, "max_tokens": limit}
        stage["engine_args"] |= {"enforce_eager": False, "kernel_config": {"enable_jit_warmup": False}}
        stage["engine_args"] |= {"gpu_memory_utilization": 0.05}
    values["stage_args"][1]["engine_args"]["compilation_config"] = GRAPHS[request.param]
    values["stage_args"][2]["engine_args"]["gpu_memory_utilization"] = 0.05
    path = tmp_path_factory.mktemp("stages") / "stages.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # the reference runs on the CPU in float32
        patch.setenv("TRITON_F32_DEFAULT", "ieee")
        with Omni(str(checkpoint), stage_configs_path=str(path), stage_init_timeout=240) as omni:
            yield omni


def test_graphs(omni: Omni, reference: Reference) -> None:
    """Text and sound of a batch with every kind of input, from captured graphs."""
    prompts = [make_prompt(reference.processor, kind) for kind in MODALITIES]
    outputs = omni.generate([prompt.ours for prompt in prompts], use_tqdm=False, timeout=120)
    for prompt, text, sound in zip(prompts, outputs[::2], outputs[1::2], strict=True):
        want = reference.speak(prompt, TOKENS, FRAMES)
        assert list(text.outputs[0].token_ids) == want.tokens
        wave = torch.as_tensor(sound.multimodal_output["audio"]).cpu()
        torch.testing.assert_close(wave, want.wave, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path, reference: Reference) -> Iterator[Pipeline]:
    """Eager stages in this process."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    stages = StageSet()
    yield Pipeline(stages, checkpoint, reference.config)
    stages.close()
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_speech(pipeline: Pipeline, reference: Reference, stream: bool) -> None:
    """Text, codes and sound of a batch with every kind of input."""
    prompts = [make_prompt(reference.processor, kind) for kind in MODALITIES]
    extra = {"initial_codec_chunk_frames": 2, "codec_chunk_frames": 6}
    for prompt, got in zip(prompts, pipeline.speak(prompts, TOKENS, FRAMES, stream=stream, extra=extra), strict=True):
        want = reference.speak(prompt, TOKENS, FRAMES)
        assert got.tokens == want.tokens
        assert torch.equal(got.codes.long().cpu(), want.codes)
        torch.testing.assert_close(got.wave.cpu(), want.wave, atol=1e-3, rtol=0)


def test_a_batch_of_windows_equals_each_alone(pipeline: Pipeline, reference: Reference) -> None:
    """Windows of many lengths share a step of the vocoder."""
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(0, 128, (frames, 16), generator=generator) for frames in (1, 4, 8, 9, 16, 25, 70)]
    prompts = [{"additional_information": {"codes": codes.int()}} for codes in windows]
    for codes, prompt, result in zip(windows, prompts, pipeline.vocoder.ask(prompts), strict=True):
        assert result.error is None
        got = result.payloads[0]["audio"]
        torch.testing.assert_close(got, pipeline.vocoder.ask([prompt])[0].payloads[0]["audio"], atol=1e-3, rtol=0)
        with torch.inference_mode():
            want = reference.model.code2wav(codes.T[None])[0, 0]
        torch.testing.assert_close(got.cpu(), want, atol=1e-3, rtol=0)
