"""``TokenSampler`` against vLLM's own ``Sampler``."""

from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm.v1.sample.sampler import Sampler

from vllm_omni.model_executor.layers.sampling import Rules, TokenSampler

VOCABULARY = 40


def vllm_greedy(
    logits: torch.Tensor, prompts: list[list[int]], outputs: list[list[int]], penalties: list[float]
) -> Any:
    """vLLM's tokens for a greedy batch."""
    longest, zeros = max(map(len, prompts)), torch.zeros(len(prompts))
    padded = torch.tensor([prompt + [VOCABULARY] * (longest - len(prompt)) for prompt in prompts])
    metadata = SamplingMetadata(
        temperature=None, all_greedy=True, all_random=False, top_p=None, top_k=None, generators={},
        max_num_logprobs=None, no_penalties=False, prompt_token_ids=padded, frequency_penalties=zeros,
        presence_penalties=zeros, repetition_penalties=torch.tensor(penalties), output_token_ids=outputs,
        allowed_token_ids_mask=None, bad_words_token_ids={}, logitsprocs=LogitsProcessors(),
    )  # fmt: skip
    return Sampler()(logits.clone(), metadata).sampled_token_ids[:, 0].tolist()


def rules(
    slot: int, temperature: float = 0.0, top_k: int = VOCABULARY, top_p: float = 1.0, penalty: float = 1.0
) -> Any:
    return Rules(slot, temperature, top_k, top_p, penalty)


def opened(tokens: TokenSampler, slot: int, prompt: list[int], least: int = 0, stops: tuple[int, ...] = ()) -> None:
    tokens.open(slot, np.array(prompt, dtype=np.int32), 0, least, stops)


@torch.inference_mode()
def test_greedy_tokens_are_vllms() -> None:
    """With penalties, over many steps, the rows in another order each time and one now and then left out."""
    generator = torch.Generator().manual_seed(0)
    tokens = TokenSampler(8, VOCABULARY, 64)
    penalties = [1.0, 1.3, 2.0, 0.7, 1.05]
    prompts = [torch.randint(0, VOCABULARY, (3 + i,), generator=generator).tolist() for i in range(5)]
    slots, outputs = [6, 0, 3, 1, 7], [[] for _ in range(5)]  # type: list[int], list[list[int]]
    for slot, prompt in zip(slots, prompts, strict=True):
        opened(tokens, slot, prompt)
    for step in range(30):
        order = torch.randperm(5, generator=generator).tolist()[: 5 - step % 2]
        idle = order[0] if step % 3 == 0 else -1
        tokens.arrange([None if i == idle else rules(slots[i], penalty=penalties[i]) for i in order])
        logits = torch.randn(len(order), VOCABULARY, generator=generator)
        want = vllm_greedy(
            logits, [prompts[i] for i in order], [outputs[i] for i in order], [penalties[i] for i in order]
        )
        got = tokens.sample(logits, torch.ones_like(logits))
        tokens.keep(got)
        for row, i in enumerate(order):
            if i != idle:
                assert got[row] == want[row]
                outputs[i].append(want[row])
    for slot, output in zip(slots, outputs, strict=True):
        assert tokens.made(slot, len(output)) == output


@torch.inference_mode()
def test_a_request_that_comes_back_goes_on() -> None:
    """What was said before counts: for the penalty, for the minimum of tokens, and in the record."""
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [4, 5, 6]] = torch.tensor([3.0, 2.0, 1.0])
    tokens = TokenSampler(2, VOCABULARY, 8)
    tokens.open(1, np.array([9, 4, 5], dtype=np.int32), 2, 0, ())
    tokens.arrange([rules(1, penalty=4.0)])
    assert tokens.sample(logits, torch.ones_like(logits)).tolist() == [6]
    tokens.keep(torch.tensor([6]))
    assert tokens.made(1, 3) == [4, 5, 6]


def test_numbers_are_exact_in_a_model_of_half_precision() -> None:
    """vLLM builds a model with torch's default type set to the model's."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        tokens = TokenSampler(2, 3000, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    tokens.arrange([Rules(1, 0.9, 2999, 0.95, 1.05)])
    want = torch.tensor([1, 0.9, 2999, 0.95, 1.05])
    assert torch.equal(tokens._rules[0], want)


@torch.inference_mode()
def test_stops_are_barred_before_the_minimum() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 7], logits[:, 8] = 2.0, 1.0
    tokens = TokenSampler(2, VOCABULARY, 8)
    opened(tokens, 0, [1], least=2, stops=(7, VOCABULARY + 3))
    opened(tokens, 1, [1], least=0, stops=(7,))
    tokens.arrange([rules(0), rules(1)])
    said = []
    for _ in range(4):
        said.append(tokens.sample(logits, torch.ones_like(logits)).tolist())
        tokens.keep(torch.tensor(said[-1]))
    assert said == [[8, 7], [8, 7], [7, 7], [7, 7]]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "penalty"),
    [(1.0, VOCABULARY, 1.0, 1.0), (0.7, 8, 1.0, 1.5), (1.5, VOCABULARY, 0.6, 1.0), (0.9, 12, 0.8, 1.05)],
)
@torch.inference_mode()
def test_draws_have_vllms_distribution(temperature: float, top_k: int, top_p: float, penalty: float) -> None:
    """Beside a greedy row, which no draw touches."""
    count = 4000
    torch.manual_seed(0)
    logits = torch.randn(1, VOCABULARY) * 2
    tokens = TokenSampler(count, VOCABULARY, 2)
    prompt = logits[0].topk(3).indices.tolist()
    for slot in range(count):
        opened(tokens, slot, prompt)
    drawn = [rules(slot, temperature, top_k, top_p, penalty) for slot in range(1, count)]
    tokens.arrange([rules(0, penalty=penalty), *drawn])
    assert tokens.drawing
    got = tokens.sample(logits.expand(count, -1), torch.empty(count, VOCABULARY).exponential_())
    bent = logits.clone()
    bent[0, prompt] = torch.where(bent[0, prompt] > 0, bent[0, prompt] / penalty, bent[0, prompt] * penalty)
    assert got[0] == bent.argmax()
    kept = apply_top_k_top_p_pytorch(bent / temperature, torch.tensor([top_k]), torch.tensor([top_p]))
    want = kept.softmax(-1)[0]
    found = torch.bincount(got[1:], minlength=VOCABULARY) / (count - 1)
    assert set(found.nonzero().flatten().tolist()) <= set(want.nonzero().flatten().tolist())
    assert (found - want).abs().sum() < 0.1


def compare_kernels() -> None:
    """Same tokens, same record, for every kind of row; on a CPU, in the interpreter of ``test_dense_kernels``."""
    from vllm_omni.model_executor.layers import sampling_kernels

    torch.manual_seed(0)
    assert sampling_kernels.check(40, torch.device("cpu")) is None
    assert "tokens" in str(sampling_kernels.check(20000, torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [3072, 8448])
@torch.inference_mode()
def test_kernels_of_released_sizes(vocabulary: int) -> None:
    from vllm_omni.model_executor.layers import sampling_kernels

    for _ in range(5):
        assert sampling_kernels.check(vocabulary, torch.device("cuda")) is None
