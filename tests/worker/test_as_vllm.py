"""What vLLM gives stays: on the same checkpoint, plain vLLM and an omni stage give the same text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm import LLM
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from tests.ar_models import HIDDEN, LAYERS, save_lm
from tests.ar_support import SMALL, Stage, StageSet
from vllm_omni.errors import RequestError

TEXTS = ["say it again", "You are Qwen, a virtual human", "describe what you see"]
JSON = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": False}
OTHER = {name: value for name, value in SMALL.items() if name != "distributed_executor_backend"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    save_lm(folder, "qwen3")
    return folder


@pytest.fixture(scope="module")
def stage(folder: Path, start_stage: StageSet) -> Stage:
    return start_stage(
        folder, hidden_layers=(0, 1, -1), enable_lora=True, max_lora_rank=8, enable_prefix_caching=True, block_size=32
    )


@pytest.fixture(scope="module")
def plain(folder: Path, stage: Stage) -> LLM:
    return LLM(str(folder), enable_lora=True, max_lora_rank=8, **OTHER)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> LoRARequest:
    folder = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(4)
    weights = {}
    for layer in range(LAYERS):
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(4, 96, generator=generator)
        weights[f"{name}.lora_B.weight"] = torch.randn(HIDDEN, 4, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["down_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return LoRARequest("tiny", 1, str(folder))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, max_tokens=12),
        SamplingParams(temperature=0.9, top_p=0.8, top_k=20, seed=3, max_tokens=12),
        SamplingParams(
            temperature=0.7, seed=5, repetition_penalty=1.2, presence_penalty=0.5, min_p=0.02, max_tokens=12
        ),
        SamplingParams(temperature=0.0, logprobs=3, max_tokens=6),
        SamplingParams(temperature=0.0, max_tokens=12, logit_bias={7: 50.0}, stop_token_ids=[7]),
        SamplingParams(
            temperature=0.0, max_tokens=24, structured_outputs=StructuredOutputsParams(choice=["yes", "no"])
        ),
        SamplingParams(temperature=0.0, max_tokens=24, structured_outputs=StructuredOutputsParams(regex="[ab]{3}-7")),
        SamplingParams(temperature=0.0, max_tokens=40, structured_outputs=StructuredOutputsParams(json=JSON)),
    ],
    ids=["greedy", "seeded", "penalties", "logprobs", "stop token", "choice", "regex", "json"],
)
def test_same_as_plain(plain: LLM, stage: Stage, params: SamplingParams) -> None:
    expected = plain.generate(TEXTS, params, use_tqdm=False)
    results = stage.ask(TEXTS, params)
    for want, got in zip(expected, results, strict=True):
        completion = want.outputs[0]
        assert got.tokens == list(completion.token_ids)
        assert got.text == completion.text
        assert (got.finish_reason, got.stop_reason) == (completion.finish_reason, completion.stop_reason)
        assert got.rows("hidden.1").shape[0] == len(want.prompt_token_ids or []) + len(got.tokens) - 1
        assert rounded(got.logprobs) == rounded(completion.logprobs)


def rounded(logprobs: Any) -> Any:
    """Log probabilities of each position, without what floating point adds."""
    return [item and {k: round(v.logprob, 4) for k, v in item.items()} for item in logprobs or ()]


@pytest.mark.parametrize("seed", [None, 3])
def test_a_prompt_in_parts(stage: Stage, start_stage: StageSet, folder: Path, seed: int | None) -> None:
    """What a part of a prompt samples is thrown away: neither tokens nor the generator of a seeded request move."""
    parts = start_stage(folder, hidden_layers=(-1,), max_num_batched_tokens=8, enable_chunked_prefill=True)
    params = SamplingParams(temperature=0.0 if seed is None else 0.9, seed=seed, max_tokens=10)
    texts = [text * 3 for text in TEXTS]
    steps = parts.num_steps
    for got, want in zip(parts.ask(texts, params), stage.ask(texts, params), strict=True):
        assert got.tokens == want.tokens
    assert parts.num_steps - steps > 15


def test_prompt_logprobs_beside_adapters(stage: Stage) -> None:
    """vLLM's engine would end of them on CPU."""
    with pytest.raises(RequestError, match="prompt_logprobs"):
        stage.ask(TEXTS[:1], SamplingParams(max_tokens=1, prompt_logprobs=1))


def test_stop_string(plain: LLM, stage: Stage) -> None:
    whole = plain.generate(TEXTS[:1], SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False)[0].outputs[0].text
    stop = whole[4:7]
    params = SamplingParams(temperature=0.0, max_tokens=12, stop=[stop])
    (result,) = stage.ask(TEXTS[:1], params)
    expected = plain.generate(TEXTS[:1], params, use_tqdm=False)[0].outputs[0]
    assert (result.text, result.finish_reason, result.stop_reason) == (expected.text, "stop", stop)
    assert not stage.scheduler.has_requests()


def test_lora(plain: LLM, stage: Stage, adapter: LoRARequest) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12)
    expected = plain.generate(TEXTS, params, use_tqdm=False, lora_request=adapter)
    without = plain.generate(TEXTS, params, use_tqdm=False)
    results = [stage.add(f"lora{i}", text, params, lora_request=adapter) for i, text in enumerate(TEXTS)]
    bases = [stage.add(f"base{i}", text, params) for i, text in enumerate(TEXTS)]
    stage.run()
    for want, got in zip([*expected, *without], [*results, *bases], strict=True):
        assert got.tokens == list(want.outputs[0].token_ids)
    assert bases[0].tokens != results[0].tokens


def test_prefix_cache(stage: Stage) -> None:
    """A request that sends its states computes its whole prompt; one that does not still takes it from the cache."""
    ids = [list(range(100, 200))]
    greedy = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    first = stage.ask([{"prompt_token_ids": ids[0]}], greedy)[0]
    second = stage.ask([{"prompt_token_ids": ids[0]}], greedy)[0]
    assert torch.equal(first.rows("hidden.-1"), second.rows("hidden.-1"))
    assert first.payloads[0]["start"] == 0
    assert (first.cached, second.cached) == (0, 0)
    silent = stage.ask([{"prompt_token_ids": ids[0], "emit": False}], greedy)[0]
    assert silent.payloads == []
    assert silent.tokens == first.tokens
    assert silent.cached == 96
