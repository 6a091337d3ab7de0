"""The packaged stage configuration, started as users start it: three engine processes on the tiny checkpoint."""

from __future__ import annotations

import contextlib
import importlib
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

from tests.model_executor.example import EXAMPLES, check_answer, command
from tests.model_executor.qwen2_5_omni.support import PENALTY, SAMPLES_PER_CODE, Reference, make_prompt
from tests.model_executor.support import MODALITIES
from vllm_omni.config.stage import load_stage_configs
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.entrypoints.omni_args import STAGE_CONFIGS
from vllm_omni.errors import RequestError
from vllm_omni.model_executor.tiny_models.stages import tiny_stages

TOKENS, CODES = 8, 40
NAMES = ("qwen2_5_omni", "qwen2_5_omni_2gpu", "qwen2_5_omni_3gpu", "qwen2_5_omni_thinker_only")
CHUNKS = {"initial_codec_chunk_frames": 6, "codec_chunk_frames": 12, "codec_left_context_frames": 600}


def short_stages(checkpoint: Path, folder: Path) -> Path:
    """The configuration that comes with the tiny checkpoint, greedy, short and with small chunks."""
    values = tiny_stages(checkpoint)
    for stage, limit in zip(values["stage_args"], (TOKENS, CODES), strict=False):
        greedy = {"temperature": 0.0, "max_tokens": limit, "repetition_penalty": PENALTY}
        stage["default_sampling_params"] |= greedy
    values["stage_args"][0]["engine_args"] |= {"enable_lora": True, "max_lora_rank": 8}
    values["runtime"]["connectors"]["codes"]["extra"] |= CHUNKS
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


@pytest.fixture(scope="module")
def adapter(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoRARequest, Any]:
    """An adapter of the thinker in peft's form, and a function that merges it into transformers' model."""
    folder = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(4)
    layers = reference.model.thinker.model.layers
    weights, changes = {}, []
    for index, layer in enumerate(layers):
        matrix = layer.self_attn.o_proj.weight
        down = torch.randn(4, matrix.shape[1], generator=generator)
        up = torch.randn(matrix.shape[0], 4, generator=generator)
        name = f"base_model.model.thinker.model.layers.{index}.self_attn.o_proj"
        weights |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        changes.append((matrix, 2.0 * up @ down))
    write_adapter(folder, weights)

    def merge(sign: float) -> None:
        with torch.inference_mode():
            for matrix, change in changes:
                matrix.data += sign * change

    return LoRARequest("tiny", 1, str(folder)), merge


def write_adapter(folder: Path, weights: dict[str, torch.Tensor], **values: Any) -> None:
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "bias": "none", **values}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_of_the_thinker(omni: Omni, reference: Reference, adapter: tuple[LoRARequest, Any]) -> None:
    """Beside requests without it: each is what transformers' model is with, or without, the adapter's weights."""
    prompts = [make_prompt(reference.processor, [kind]) for kind in ("text", "image")]
    lora, merge = adapter
    without = [reference.speak(prompt, TOKENS, CODES) for prompt in prompts]
    merge(1.0)
    within = [reference.speak(prompt, TOKENS, CODES) for prompt in prompts]
    merge(-1.0)
    assert [spoken.tokens for spoken in within] != [spoken.tokens for spoken in without]
    given = [*(prompt.ours for prompt in prompts), {**prompts[0].ours, "lora_request": lora}, prompts[1].ours]
    outputs = ask(omni, given, lora_request=[None, None, None, lora])
    for want, text, sound in zip([*without, *within], outputs[::2], outputs[1::2], strict=True):
        assert list(text.outputs[0].token_ids) == want.tokens
        torch.testing.assert_close(torch.as_tensor(sound.multimodal_output["audio"]), want.wave, atol=2e-3, rtol=0)


def test_adapters_that_cannot_be_used(
    omni: Omni, reference: Reference, adapter: tuple[LoRARequest, Any], tmp_path: Path
) -> None:
    """Found before the engine would end of them; the next request is right."""
    name = "base_model.model.thinker.model.layers.0.self_attn.o_proj"
    matrix = reference.model.thinker.model.layers[0].self_attn.o_proj.weight
    for rank, prefix, folder in ((16, name, "rank"), (4, name.replace("thinker.model.layers", "text.blocks"), "names")):
        pair = {"lora_A": torch.zeros(rank, matrix.shape[1]), "lora_B": torch.zeros(matrix.shape[0], rank)}
        write_adapter(tmp_path / folder, {f"{prefix}.{k}.weight": v for k, v in pair.items()}, r=rank)
    write_adapter(tmp_path / "damaged", {})
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"no tensors")
    prompt = make_prompt(reference.processor, ["text"]).ours
    wrong = [
        (LoRARequest("a", 7, str(tmp_path / "missing")), "no adapter_config.json"),
        (LoRARequest("b", 8, str(tmp_path / "rank")), "rank"),
        (LoRARequest("c", 9, str(tmp_path / "names")), "for no module"),
        (LoRARequest("d", 10, str(tmp_path / "damaged")), "cannot be loaded"),
        (LoRARequest("e", 1, str(tmp_path / "rank")), "give it another"),
        ("tiny", "LoRARequest is needed"),
    ]
    for lora, words in wrong:
        with pytest.raises(RequestError, match=words) as caught:
            ask(omni, [prompt], lora_request=lora)
        assert caught.value.details["field"] == "lora_request"
    assert len(ask(omni, [prompt], lora_request=adapter[0])) == 2


def test_one_bad_request_among_good(omni: Omni, reference: Reference) -> None:
    good = make_prompt(reference.processor, ["text"]).ours
    image = make_prompt(reference.processor, ["image"]).ours
    bad: list[tuple[Any, str]] = [
        ({**good, "additional_information": {"speaker": "nobody"}}, "speaker"),
        ({**good, "additional_information": {"speaker": "Ethan", "tempo": 2}}, "tempo"),
        ({**image, "multi_modal_data": {"image": "no picture"}}, "multi_modal_data"),
        ({**image, "multi_modal_data": {}}, "multi_modal_data"),
        ({**good, "multi_modal_data": {"smell": [1]}}, "prompt"),
        ({"prompt": good["prompt"] * 40}, "prompt"),
        ({**good, "priority": 1}, "priority"),
    ]
    for prompt, field in bad:
        with pytest.raises(RequestError) as caught:
            ask(omni, [good, prompt])
        assert caught.value.details["field"] == field
        finished = [output for output in caught.value.outputs if output.final_output_type == "audio"]
        assert [len(output.multimodal_output["audio"]) for output in finished[:1]] == [CODES * SAMPLES_PER_CODE]
    with pytest.raises(RequestError, match="the voices are"):
        omni._async.make_request(bad[0][0], None, None)  # before any stage sees it
    assert omni.is_running


def test_the_example(
    omni: Omni,
    checkpoint: Path,
    stages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``end2end.py`` reads files of every kind and writes the answer's sound. The engine is the one that runs here
    already; the other family's example starts its own."""
    started: list[tuple[Any, ...]] = []

    def start(model: str, **values: Any) -> Any:
        started.append((model, values))
        return contextlib.nullcontext(omni)

    script, *words = command("qwen2_5_omni", checkpoint, stages, tmp_path, "Ethan", seconds=2)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(importlib.import_module("ask"), "Omni", start)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(script, run_name="__main__")
    assert started == [(str(checkpoint), {"stage_configs_path": str(stages)})]
    check_answer(tmp_path, capsys.readouterr().out, CODES * SAMPLES_PER_CODE)
