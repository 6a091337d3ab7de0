"""The packaged stage configuration, started as users start it: three engine processes on the tiny checkpoint."""

from __future__ import annotations

import copy
import gc
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from vllm.sampling_params import RequestOutputKind, SamplingParams

from tests.model_executor.example import check_answer, command
from tests.model_executor.qwen3_omni.support import Reference, make_prompt
from tests.model_executor.support import MODALITIES
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.errors import ConfigError, RequestAborted, RequestError
from vllm_omni.model_executor.tiny_models.stages import tiny_stages

ROOT = Path(__file__).parents[3]
TOKENS, FRAMES = 8, 12


def short_stages(checkpoint: Path, folder: Path) -> Path:
    """The configuration that comes with the tiny checkpoint, greedy and short, with little KV cache: memory that is not
    given back is missed soon."""
    values = tiny_stages(checkpoint)
    for stage, limit in zip(values["stage_args"], (TOKENS, FRAMES), strict=False):
        stage["default_sampling_params"] |= {"temperature": 0.0, "max_tokens": limit}
        stage["engine_args"] |= {"block_size": 32, "num_gpu_blocks_override": 20}
    values["stage_args"][0]["engine_args"]["scheduling_policy"] = "priority"
    values["stage_args"][1]["engine_args"]["max_model_len"] = 352
    path = folder / "stages.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def stages(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_stages(checkpoint, tmp_path_factory.mktemp("stages"))


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


@pytest.fixture(scope="module")
def alone(omni: Omni, reference: Reference) -> list[tuple[Any, list[int], torch.Tensor]]:
    """Ten prompts of three kinds, each run when no other is in the engine: prompt, tokens, samples."""
    runs = []
    for i in range(10):
        prompt = make_prompt(reference.processor, MODALITIES[i % 3], "say " * (i % 5 + 1), seed=i).ours
        text, sound = ask(omni, [prompt])
        runs.append((prompt, list(text.outputs[0].token_ids), torch.as_tensor(sound.multimodal_output["audio"])))
    return runs


def test_aborts_under_load(omni: Omni, alone: list[tuple[Any, list[int], torch.Tensor]]) -> None:
    """Fifty requests, twenty of which go away at random points, some in the middle of their sound: the others are what
    they are alone, and nothing is left in any stage. The KV caches hold about five requests: stages run out of them."""
    rng = random.Random(0)
    leaves = {i: rng.randint(1, TOKENS + 2) for i in rng.sample(range(50), 20)}
    for i in list(leaves)[:8]:
        leaves[i] = -rng.randint(1, 2)  # pieces of sound
    seen, heard = [0] * 50, [0] * 50
    text: list[list[int]] = [[] for _ in range(50)]
    sound: list[list[torch.Tensor]] = [[] for _ in range(50)]
    in_sound = 0

    def run() -> None:
        nonlocal in_sound
        prompts = [alone[i % 10][0] for i in range(50)]
        for output in omni.generate(prompts, streaming(omni), py_generator=True, use_tqdm=False, timeout=300):
            i = int(output.request_id.partition("_")[0])
            seen[i] += 1
            if "audio" in output.multimodal_output:
                sound[i].append(torch.as_tensor(output.multimodal_output["audio"]))
                heard[i] += 1
            elif output.final_output_type == "text":
                text[i] += output.outputs[0].token_ids
            if i in leaves and leaves[i] in (seen[i], -heard[i]):
                in_sound += heard[i] > 0
                omni.abort(output.request_id)

    with pytest.raises(RequestAborted):
        run()
    assert in_sound >= 4
    for i in set(range(50)) - set(leaves):
        _, tokens, wave_ = alone[i % 10]
        assert text[i] == tokens
        torch.testing.assert_close(torch.cat(sound[i]), wave_, atol=1e-4, rtol=0)
    assert omni._async.orchestrator.open_requests == 0
    assert all(load.inside == load.waiting == 0 for load in omni._async.orchestrator.loads.values())
    again = ask(omni, [prompt for prompt, _, _ in alone])
    for (_, tokens, wave_), out, spoken in zip(alone, again[::2], again[1::2], strict=True):
        assert list(out.outputs[0].token_ids) == tokens
        torch.testing.assert_close(torch.as_tensor(spoken.multimodal_output["audio"]), wave_, atol=1e-4, rtol=0)
    nothing_is_left(omni)


def streaming(omni: Omni) -> list[Any]:
    """The stages' own parameters, with a piece of text for every token."""
    params = [copy.deepcopy(given) for given in omni.default_sampling_params_list]
    params[0].output_kind = RequestOutputKind.DELTA
    return params


def test_adapters_beside_experts_need_a_gpu(checkpoint: Path, stages: Path, tmp_path: Path) -> None:
    """Refused before a process is started: vLLM's engine would end of the first step."""
    values = yaml.safe_load(stages.read_text())
    values["stage_args"][0]["engine_args"]["enable_lora"] = True
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="enable_lora"):
        Omni(str(checkpoint), stage_configs_path=str(path))


def test_several_answers(omni: Omni, reference: Reference) -> None:
    """Of text alone; seeded ones are those of the seeds one after another."""
    prompt = make_prompt(reference.processor, "text").ours
    sampled = {"temperature": 1.0, "max_tokens": 6, "seed": 5}
    (output,) = ask(omni, [prompt], sampling_params=SamplingParams(n=3, **sampled), output_modalities=["text"])
    answers = [list(answer.token_ids) for answer in output.outputs]
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    for i, tokens in enumerate(answers):
        single = SamplingParams(**{**sampled, "seed": 5 + i})
        (one,) = ask(omni, [prompt], sampling_params=single, output_modalities=["text"])
        assert list(one.outputs[0].token_ids) == tokens
    assert len({tuple(tokens) for tokens in answers}) == 3
    with pytest.raises(RequestError, match="for text alone"):
        ask(omni, [prompt], sampling_params=SamplingParams(n=2))
    pieces: dict[int, list[int]] = {0: [], 1: []}
    delta = SamplingParams(n=2, output_kind=RequestOutputKind.DELTA, **sampled)
    for part in omni.generate(prompt, delta, py_generator=True, use_tqdm=False, output_modalities=["text"]):
        for answer in part.outputs:
            pieces[answer.index] += answer.token_ids
    assert list(pieces.values()) == answers[:2]
    first = next(omni.generate(prompt, delta, py_generator=True, use_tqdm=False, output_modalities=["text"]))
    omni.abort(first.request_id)
    assert not omni._async.orchestrator.open_requests


def test_one_set_of_parameters_is_for_the_text(omni: Omni, reference: Reference) -> None:
    prompt = make_prompt(reference.processor, "text")
    text, sound = ask(omni, [prompt.ours], sampling_params=SamplingParams(temperature=0.0, max_tokens=5), priority=-1)
    want = reference.speak(prompt, 5, FRAMES)
    assert list(text.outputs[0].token_ids) == want.tokens
    torch.testing.assert_close(torch.as_tensor(sound.multimodal_output["audio"]), want.wave, atol=1e-3, rtol=0)


def test_a_prompt_that_is_too_long_for_the_talker_alone(omni: Omni, reference: Reference) -> None:
    """The stage that cannot take it says so; without speech the same prompt is fine."""
    words, prompt = 20, make_prompt(reference.processor, "image")
    while len(reference.processor.tokenizer(prompt.text).input_ids) < 400:
        words += 10
        prompt = make_prompt(reference.processor, "image", "say " * words)
    good = make_prompt(reference.processor, "text").ours
    with pytest.raises(RequestError) as caught:
        ask(omni, [prompt.ours, good])
    assert caught.value.details["stage_id"] == 1
    assert "352" in str(caught.value)
    spoken = [output for output in caught.value.outputs if output.final_output_type == "audio"]
    assert [len(output.multimodal_output["audio"]) for output in spoken] == [FRAMES * 1920 - 555]
    (text,) = ask(omni, [prompt.ours], output_modalities=["text"])
    assert len(text.outputs[0].token_ids) == TOKENS
    spoken.clear()
    caught.value.outputs.clear()
    nothing_is_left(omni)
    assert "generate" in [entry.name for entry in caught.traceback], "the error is kept, and says where it was asked"


def nothing_is_left(omni: Omni) -> None:
    """No request and no shared memory in any stage."""
    gc.collect()
    deadline = time.monotonic() + 20
    while (counts := omni.collective_rpc("omni_counts")) != [{"requests": 0, "busy_segments": 0}] * 3:
        assert time.monotonic() < deadline, counts


@pytest.mark.parametrize("page", ["requests", "streaming"])
def test_the_pages_examples_run(omni: Omni, page: str) -> None:
    text = (ROOT / "docs" / "user_guide" / f"{page}.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "Omni(" not in block]
    prompt = "<|im_start|>user\nHow does a rainbow come about?<|im_end|>\n<|im_start|>assistant\n"
    names: dict[str, Any] = {"omni": omni, "prompt": prompt}
    for block in blocks:
        exec(block, names)
    assert blocks


def test_one_bad_request_among_good(omni: Omni, reference: Reference) -> None:
    good = make_prompt(reference.processor, "text").ours
    image = make_prompt(reference.processor, "image").ours
    bad: list[tuple[Any, str]] = [
        ({**good, "additional_information": {"speaker": "nobody"}}, "speaker"),
        ({**good, "additional_information": {"speaker": "Ethan", "tempo": 2}}, "tempo"),
        ({**image, "multi_modal_data": {"image": "no picture"}}, "multi_modal_data"),
        ({**image, "multi_modal_data": {}}, "multi_modal_data"),
        ({**image, "multi_modal_data": {"image": None}}, "multi_modal_data"),
        ({**good, "multi_modal_data": {"smell": [1]}}, "prompt"),
        ({"prompt": good["prompt"] * 40}, "prompt"),
        ({**good, "priority": "high"}, "priority"),
    ]
    for prompt, field in bad:
        with pytest.raises(RequestError) as caught:
            ask(omni, [good, prompt])
        assert caught.value.details["field"] == field
        finished = [output for output in caught.value.outputs if output.final_output_type == "audio"]
        assert [len(output.multimodal_output["audio"]) for output in finished[:1]] == [FRAMES * 1920 - 555]
    thinker, talker, _ = omni.default_sampling_params_list
    with pytest.raises(RequestError, match=r"stage 2: extra_args=.*it reads none"):
        ask(omni, [good], sampling_params_list=[thinker, talker, SamplingParams(extra_args={"num_steps": 3})])
    with pytest.raises(RequestError, match="the voices are"):
        omni._async.make_request(bad[0][0], None, None)  # before any stage sees it
    assert omni.is_running


def sound(samples: Any, rate: int = 16000) -> dict[str, Any]:
    return {"audio": (samples, rate)}


NOISE = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
HOLE = np.where(np.arange(16000) == 5, np.float32("nan"), NOISE)
FRAMES_OF_NOTHING = np.full((4, 64, 64, 3), np.inf, np.float32)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("audio", {"multi_modal_data": {"audio": b"RIFF"}}, "a bytes; allowed is an array of samples"),
        ("image", {"multi_modal_data": {"image": b"\x89PNG"}}, "a bytes; allowed is a PIL image"),
        ("video", {"multi_modal_data": {"video": b""}}, "a bytes; allowed is an array of"),
        ("audio", {"multi_modal_data": sound(NOISE.tolist())}, "a list; allowed is an array of samples"),
        ("audio", {"multi_modal_data": sound(np.array(["a"] * 400))}, "allowed are numbers"),
        ("audio", {"multi_modal_data": sound(NOISE[:0])}, "nothing is in it"),
        ("audio", {"multi_modal_data": sound(NOISE[:1])}, "1 samples at 16000 Hz; 201 are needed"),
        ("audio", {"multi_modal_data": sound(NOISE[:200])}, "200 samples at 16000 Hz; 201 are needed"),
        ("audio", {"multi_modal_data": sound(NOISE[:50], 8000)}, "samples at 16000 Hz; 201 are needed"),
        ("audio", {"multi_modal_data": sound(HOLE)}, "not finite"),
        ("audio", {"multi_modal_data": sound(torch.from_numpy(HOLE))}, "not finite"),
        ("video", {"multi_modal_data": {"video": FRAMES_OF_NOTHING}}, "not finite"),
        ("audio", {"multi_modal_data": sound(NOISE, 0)}, "sampling rate 0"),
        ("audio", {"multi_modal_data": {"audio": [(NOISE, 16000)] * 2}}, "2 given, but the prompt has 1 places"),
        ("text", {"multi_modal_data": sound(NOISE)}, "1 given, but the prompt has 0 places"),
        ("image", {"mm_processor_kwargs": {"min_pixel": 1024}}, "did you mean 'min_pixels'"),
        ("image", {"mm_processor_kwargs": {"images_kwargs": {"fps": 1.0}}}, "the processor has no 'fps'"),
        ("image", {"mm_processor_kwargs": {"images_kwargs": 1}}, "must be a dictionary"),
    ],
)
def test_wrong_media(omni: Omni, reference: Reference, kind: str, change: dict[str, Any], message: str) -> None:
    """Refused by name, and for that request alone."""
    right = make_prompt(reference.processor, kind).ours
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        ask(omni, [{**right, **change}, right], output_modalities=["text"])
    assert caught.value.details["field"] in change
    assert [output.request_id[0] for output in caught.value.outputs] == ["1"]


def test_media_of_a_refused_request_can_be_sent_again(omni: Omni, reference: Reference) -> None:
    """vLLM keeps what it made of them, and its engine has to have it, too."""
    prompt = make_prompt(reference.processor, "image", seed=77).ours
    for wrong in ({"prompt": prompt["prompt"] + "say " * 800}, {"prompt": prompt["prompt"] + "<|audio_pad|>"}):
        with pytest.raises(RequestError):
            ask(omni, [{**prompt, **wrong}], output_modalities=["text"])
    first = ask(omni, [prompt], output_modalities=["text"])[0]
    fine = {**prompt, "mm_processor_kwargs": {"images_kwargs": {"min_pixels": 64}, "use_audio_in_video": False}}
    for again in (prompt, fine):
        assert ask(omni, [again], output_modalities=["text"])[0].outputs[0].token_ids == first.outputs[0].token_ids


def test_the_example(checkpoint: Path, stages: Path, tmp_path: Path) -> None:
    """``end2end.py`` reads files of every kind and writes the answer's sound."""
    done = subprocess.run(
        [sys.executable, *command("qwen3_omni", checkpoint, stages, tmp_path, "chelsie", seconds=3)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_answer(tmp_path, done.stdout, FRAMES * 1920 - 555)
