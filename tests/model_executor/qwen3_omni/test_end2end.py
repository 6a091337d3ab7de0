"""The packaged stage configuration, started as users start it: three engine processes on the tiny checkpoint."""

from __future__ import annotations

import copy
import os
import random
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
from vllm.sampling_params import RequestOutputKind

from tests.ar_support import SMALL
from tests.model_executor.qwen3_omni.support import MODALITIES, Reference, make_prompt
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.entrypoints.omni_args import STAGE_CONFIGS
from vllm_omni.errors import RequestAborted, RequestError

ROOT = Path(__file__).parents[3]
TOKENS, FRAMES = 8, 12


def tiny_stages(name: str, config: Any, folder: Path) -> Path:
    """A packaged configuration with the sizes of the tiny checkpoint, on the CPU, greedy and short."""
    values = yaml.safe_load((STAGE_CONFIGS / name).read_text())
    for stage, limit in zip(values["stage_args"], (TOKENS, FRAMES, None), strict=False):
        args = {**stage["engine_args"], **SMALL, "max_model_len": 512, "dtype": "float32"}
        for name in ("gpu_memory_utilization", "max_num_batched_tokens"):
            args.pop(name, None)
        if "hidden_layers" in args:
            args["hidden_layers"] = [config.talker_config.accept_hidden_layer]
        if stage["stage_type"] == "generation":
            args.pop("enforce_eager")
        else:
            stage["default_sampling_params"] |= {"temperature": 0.0, "max_tokens": limit}
        stage["engine_args"] = args
    talker = values["stage_args"][1:2]
    for stage in talker:
        stage["default_sampling_params"]["stop_token_ids"] = [config.talker_config.codec_eos_token_id]
    path = folder / "stages.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def stages(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stages("qwen3_omni_moe.yaml", reference.config, tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def omni(checkpoint: Path, stages: Path) -> Iterator[Omni]:
    with Omni(str(checkpoint), stage_configs_path=str(stages), stage_init_timeout=200) as omni:
        yield omni


def ask(omni: Omni, prompts: list[Any], **values: Any) -> list[Any]:
    outputs = omni.generate(prompts, use_tqdm=False, timeout=120, **values)
    assert isinstance(outputs, list)
    return outputs


def test_all_inputs_at_once(omni: Omni, reference: Reference) -> None:
    """Text and sound of a batch with every kind of input."""
    prompts = [make_prompt(reference.processor, kind) for kind in MODALITIES]
    outputs = ask(omni, [prompt.ours for prompt in prompts])
    assert [output.final_output_type for output in outputs] == ["text", "audio"] * len(prompts)
    for prompt, text, sound in zip(prompts, outputs[::2], outputs[1::2], strict=True):
        want = reference.speak(prompt, TOKENS, FRAMES)
        assert list(text.outputs[0].token_ids) == want.tokens
        assert sound.multimodal_output["sr"] == 24000
        wave_ = torch.as_tensor(sound.multimodal_output["audio"])
        assert wave_.shape == want.wave.shape
        torch.testing.assert_close(wave_, want.wave, atol=1e-3, rtol=0)


def test_sound_comes_in_pieces(omni: Omni, reference: Reference) -> None:
    """The pieces, as they are made, are the whole."""
    prompt = make_prompt(reference.processor, "text").ours
    pieces = [
        output.multimodal_output["audio"]
        for output in omni.generate([prompt], py_generator=True, use_tqdm=False, timeout=120)
        if output.final_output_type == "audio" and "audio" in output.multimodal_output
    ]
    assert [len(piece) for piece in pieces] == [4 * 1920 - 555, 8 * 1920]
    whole = ask(omni, [prompt], output_modalities=["audio"])[0].multimodal_output["audio"]
    torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-4, rtol=0)


def test_text_alone_does_not_run_the_talker(omni: Omni, reference: Reference) -> None:
    (output,) = ask(omni, [make_prompt(reference.processor, "image").ours], output_modalities=["text"])
    assert len(output.outputs[0].token_ids) == TOKENS
    assert set(output.metrics["stages"]) == {"0"}


def test_nothing_to_speak_is_text_without_sound(omni: Omni, reference: Reference) -> None:
    params = [copy.deepcopy(given) for given in omni.default_sampling_params_list]
    params[0].max_tokens = 1
    (output,) = ask(omni, [make_prompt(reference.processor, "text").ours], sampling_params_list=params)
    assert output.final_output_type == "text"
    assert len(output.outputs[0].token_ids) == 1


def test_aborts_under_load(omni: Omni, reference: Reference) -> None:
    """Of many requests some go away at random points; the others are what they are without that, nothing is left."""
    prompts = [
        make_prompt(reference.processor, MODALITIES[i % 3], "say " * (i % 5 + 1), seed=i).ours for i in range(24)
    ]
    outputs = ask(omni, prompts)
    want = [torch.as_tensor(output.multimodal_output["audio"]) for output in outputs[1::2]]
    rng = random.Random(0)
    leaves = {i: rng.randint(1, 8) for i in rng.sample(range(len(prompts)), 9)}
    seen, got = [0] * len(prompts), [[] for _ in prompts]

    def run() -> None:
        for output in omni.generate(prompts, streaming(omni), py_generator=True, use_tqdm=False, timeout=120):
            index = int(output.request_id.partition("_")[0])
            seen[index] += 1
            if seen[index] == leaves.get(index):
                omni.abort(output.request_id)
            if "audio" in output.multimodal_output:
                got[index].append(torch.as_tensor(output.multimodal_output["audio"]))

    with pytest.raises(RequestAborted):
        run()
    for index, wave_ in enumerate(want):
        if index not in leaves:
            torch.testing.assert_close(torch.cat(got[index]), wave_, atol=1e-4, rtol=0)
    again = ask(omni, prompts[:2])
    torch.testing.assert_close(torch.as_tensor(again[1].multimodal_output["audio"]), want[0], atol=1e-4, rtol=0)
    assert all(counts["busy_segments"] == 0 for counts in omni.collective_rpc("omni_counts"))


def streaming(omni: Omni) -> list[Any]:
    """The stages' own parameters, with a piece of text for every token."""
    params = [copy.deepcopy(given) for given in omni.default_sampling_params_list]
    params[0].output_kind = RequestOutputKind.DELTA
    return params


def test_one_bad_request_among_good(omni: Omni, reference: Reference) -> None:
    good = make_prompt(reference.processor, "text").ours
    silent = {**good, "additional_information": {"speaker": "nobody"}}
    broken = {**make_prompt(reference.processor, "image").ours, "multi_modal_data": {"image": "no picture"}}
    long = {"prompt": good["prompt"] * 40}
    for bad, field in ((silent, "speaker"), (broken, "prompt"), (long, "prompt")):
        with pytest.raises(RequestError) as caught:
            ask(omni, [good, bad])
        assert caught.value.details["field"] == field
        finished = [output for output in caught.value.outputs if output.final_output_type == "audio"]
        assert [len(output.multimodal_output["audio"]) for output in finished[:1]] == [FRAMES * 1920 - 555]
    assert omni.is_running


def test_the_example(checkpoint: Path, stages: Path, tmp_path: Path) -> None:
    """``end2end.py`` reads files of every kind and writes the answer's sound."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "picture.png")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 24000, 0, "NONE", ""))
        file.writeframes(rng.integers(-9999, 9999, 12000).astype(np.int16).tobytes())
    writer = cv2.VideoWriter(str(tmp_path / "video.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 8, (64, 64))
    for _ in range(24):
        writer.write(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    writer.release()
    script = ROOT / "examples" / "offline_inference" / "qwen3_omni" / "end2end.py"
    command = [sys.executable, str(script), "--model", str(checkpoint), "--stage-configs-path", str(stages)]
    files = ["--image", "picture.png", "--audio", "sound.wav", "--video", "video.mp4"]
    done = subprocess.run(
        [*command, *files, "--speaker", "chelsie", "--output", "answer.wav", "what is it"],
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
        assert file.getnframes() == FRAMES * 1920 - 555
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
    assert samples.std() > 100
    assert "answer.wav: 0.9" in done.stdout
