"""The packaged stage configuration, started as users start it: three engine processes on the tiny checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.ar_support import SMALL
from tests.model_executor.qwen2_5_omni.support import MODALITIES, PENALTY, SAMPLES_PER_CODE, Reference, make_prompt
from vllm_omni.config.stage import load_stage_configs
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.entrypoints.omni_args import STAGE_CONFIGS
from vllm_omni.errors import RequestError

ROOT = Path(__file__).parents[3]
TOKENS, CODES = 8, 40
NAMES = ("qwen2_5_omni", "qwen2_5_omni_2gpu", "qwen2_5_omni_3gpu", "qwen2_5_omni_thinker_only")
CHUNKS = {"initial_codec_chunk_frames": 6, "codec_chunk_frames": 12, "codec_left_context_frames": 600}


def tiny_stages(name: str, folder: Path) -> Path:
    """A packaged configuration with the sizes of the tiny checkpoint, on the CPU, greedy and short."""
    values = yaml.safe_load((STAGE_CONFIGS / f"{name}.yaml").read_text())
    for stage, limit in zip(values["stage_args"], (TOKENS, CODES, None), strict=False):
        args = {**stage["engine_args"], **SMALL, "max_model_len": 512, "dtype": "float32"}
        for key in ("gpu_memory_utilization", "max_num_batched_tokens"):
            args.pop(key, None)
        if stage["stage_type"] == "generation":
            args.pop("enforce_eager")
        else:
            stage["default_sampling_params"] |= {
                "temperature": 0.0,
                "max_tokens": limit,
                "repetition_penalty": PENALTY,
            }
        stage["engine_args"] = args
    values["runtime"]["connectors"]["codes"]["extra"] |= CHUNKS
    path = folder / "stages.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stages("qwen2_5_omni", tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def omni(checkpoint: Path, stages: Path) -> Iterator[Omni]:
    with Omni(str(checkpoint), stage_configs_path=str(stages), stage_init_timeout=200) as omni:
        yield omni


def ask(omni: Omni, prompts: list[Any], **values: Any) -> list[Any]:
    outputs = omni.generate(prompts, use_tqdm=False, timeout=120, **values)
    assert isinstance(outputs, list)
    return outputs


@pytest.mark.parametrize("name", NAMES)
def test_packaged_configurations_are_right(name: str) -> None:
    config = load_stage_configs(STAGE_CONFIGS / f"{name}.yaml")
    assert [stage.stage_id for stage in config.stages] == list(range(1 if "only" in name else 3))
    devices: dict[str, float] = {}
    for stage in config.stages:
        for device in (stage.runtime.devices or "0").split(","):
            devices[device] = devices.get(device, 0) + stage.engine_args["gpu_memory_utilization"]
    assert all(share <= 0.95 for share in devices.values()), devices
    assert len(devices) == int(name[-4]) if "gpu" in name else len(devices) == 1


def test_all_inputs_at_once(omni: Omni, reference: Reference) -> None:
    """Text and sound of a batch with every kind of input."""
    prompts = [make_prompt(reference.processor, [kind]) for kind in MODALITIES]
    outputs = ask(omni, [prompt.ours for prompt in prompts])
    assert [output.final_output_type for output in outputs] == ["text", "audio"] * len(prompts)
    for prompt, text, sound in zip(prompts, outputs[::2], outputs[1::2], strict=True):
        want = reference.speak(prompt, TOKENS, CODES)
        assert list(text.outputs[0].token_ids) == want.tokens
        assert sound.multimodal_output["sr"] == 24000
        made = torch.as_tensor(sound.multimodal_output["audio"])
        assert made.shape == want.wave.shape
        # Streamed: what comes after a window's right context of 24 codes is not heard.
        torch.testing.assert_close(made, want.wave, atol=1e-3, rtol=0)


def test_sound_comes_in_pieces(omni: Omni, reference: Reference) -> None:
    """The pieces, as they are made, are the whole."""
    prompt = make_prompt(reference.processor, ["text"]).ours
    pieces = [
        output.multimodal_output["audio"]
        for output in omni.generate([prompt], py_generator=True, use_tqdm=False, timeout=120)
        if output.final_output_type == "audio" and "audio" in output.multimodal_output
    ]
    assert len(pieces) > 1
    assert len(pieces[0]) == 6 * SAMPLES_PER_CODE
    assert sum(map(len, pieces)) == CODES * SAMPLES_PER_CODE


def test_text_alone_does_not_run_the_talker(omni: Omni, reference: Reference) -> None:
    (output,) = ask(omni, [make_prompt(reference.processor, ["image"]).ours], output_modalities=["text"])
    assert len(output.outputs[0].token_ids) == TOKENS
    assert set(output.metrics["stages"]) == {"0"}


def test_one_bad_request_among_good(omni: Omni, reference: Reference) -> None:
    good = make_prompt(reference.processor, ["text"]).ours
    silent = {**good, "additional_information": {"speaker": "nobody"}}
    broken = {**make_prompt(reference.processor, ["image"]).ours, "multi_modal_data": {"image": "no picture"}}
    for bad, field in ((silent, "speaker"), (broken, "prompt")):
        with pytest.raises(RequestError) as caught:
            ask(omni, [good, bad])
        assert caught.value.details["field"] == field
        finished = [output for output in caught.value.outputs if output.final_output_type == "audio"]
        assert [len(output.multimodal_output["audio"]) for output in finished[:1]] == [CODES * SAMPLES_PER_CODE]
    assert omni.is_running


def test_the_example(checkpoint: Path, stages: Path, tmp_path: Path) -> None:
    """``end2end.py`` reads files of every kind and writes the answer's sound."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "picture.png")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 24000, 0, "NONE", ""))
        file.writeframes(rng.integers(-9999, 9999, 12000).astype(np.int16).tobytes())
    writer = cv2.VideoWriter(str(tmp_path / "video.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 8, (64, 64))
    for _ in range(16):
        writer.write(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    writer.release()
    script = ROOT / "examples" / "offline_inference" / "qwen2_5_omni" / "end2end.py"
    command = [sys.executable, str(script), "--model", str(checkpoint), "--stage-configs-path", str(stages)]
    files = ["--image", "picture.png", "--audio", "sound.wav", "--video", "video.mp4"]
    done = subprocess.run(
        [*command, *files, "--speaker", "Ethan", "--output", "answer.wav", "what is it"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with wave.open(str(tmp_path / "answer.wav")) as file:
        assert file.getparams()[:3] == (1, 2, 24000)
        assert file.getnframes() == CODES * SAMPLES_PER_CODE
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
    assert samples.std() > 100
    assert "answer.wav: 0.80 s" in done.stdout
