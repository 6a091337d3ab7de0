"""Hidden states out of a stage equal transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams

from tests.ar_models import save_lm
from tests.ar_support import Result, Stage, StageSet

LAYERS = (0, 1, 2, -1)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, prompt_logprobs=0)
PROMPTS = [list(range(5, 5 + n)) for n in (7, 19, 40)]


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_lm(folder, request.param)


def reference(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], dict[int, torch.Tensor]]:
    """Greedy tokens, and the states of every position that was computed: the prompt and all tokens but the last."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        states = model(out[:, :-1], output_hidden_states=True).hidden_states
    found = {layer: states[layer][0] for layer in LAYERS}
    return out[0, len(prompt) :].tolist(), found


def check(model: Any, stage: Stage) -> None:
    results = stage.ask([{"prompt_token_ids": prompt} for prompt in PROMPTS], GREEDY)
    for prompt, result in zip(PROMPTS, results, strict=True):
        tokens, states = reference(model, prompt, len(result.tokens))
        assert result.tokens == tokens
        assert len(result.payloads) == len(tokens)  # the prompt with the first token, then one row a token
        for layer in LAYERS:
            rows = result.rows(f"hidden.{layer}")
            assert rows.shape == states[layer].shape
            torch.testing.assert_close(rows, states[layer], atol=1e-5, rtol=1e-4)
        check_prompt_logprobs(model, prompt, result)


@torch.inference_mode()
def check_prompt_logprobs(model: Any, prompt: list[int], result: Result) -> None:
    """The first position has none; each further one has at least its own token's."""
    first, *rest = result.prompt_logprobs
    assert first is None
    got = [found[token].logprob for found, token in zip(rest, prompt[1:], strict=True)]
    logits = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(torch.tensor(got), logits.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0])


def test_states_of_prompt_and_tokens(model: tuple[Path, Any], start_stage: StageSet) -> None:
    check(model[1], start_stage(model[0], hidden_layers=LAYERS))


def test_chunked_prefill(model: tuple[Path, Any], start_stage: StageSet) -> None:
    stage = start_stage(model[0], hidden_layers=LAYERS, max_num_batched_tokens=8, enable_chunked_prefill=True)
    check(model[1], stage)
    assert stage.num_steps > sum(map(len, PROMPTS)) // 8
