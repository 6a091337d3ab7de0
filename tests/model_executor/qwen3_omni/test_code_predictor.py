"""The code predictor: transformers' codes when greedy, its distribution when not."""

import pytest
import torch

from tests.model_executor.qwen3_omni.support import Reference
from vllm_omni.model_executor.layers.dense import load_dense_weights
from vllm_omni.model_executor.models.qwen3_omni.code_predictor import CodePredictor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def predictor(reference: Reference) -> CodePredictor:
    model = CodePredictor(reference.config.talker_config.code_predictor_config)
    load_dense_weights(model, reference.model.talker.code_predictor.state_dict().items())
    return model


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and first embeddings [4, C]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 64, generator=generator), torch.randn(4, 64, generator=generator)


def flags(*values: bool) -> torch.Tensor:
    return torch.tensor(values)


@torch.inference_mode()
def test_greedy_codes_of_a_batch(
    predictor: CodePredictor, reference: Reference, inputs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    hidden, first = inputs
    codes, total = predictor(hidden, first, flags(*[True] * 4), predictor.noise(4, {}, CPU))
    want = reference.model.talker.code_predictor
    for row in range(4):
        embeds = torch.stack([hidden[row], first[row]])[None]
        assert (
            codes[row].tolist() == want.generate(inputs_embeds=embeds, max_new_tokens=15, do_sample=False)[0].tolist()
        )
    embeddings = want.get_input_embeddings()
    summed = sum(embeddings[group](codes[:, group]) for group in range(15))
    torch.testing.assert_close(total, summed)


@torch.inference_mode()
def test_sampled_codes_have_the_references_distribution(
    predictor: CodePredictor, reference: Reference, inputs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """The first residual code over many draws: top 50, top p 0.8."""
    count = 3000
    hidden, first = (value[:1].expand(count, -1) for value in inputs)
    torch.manual_seed(0)
    codes, _ = predictor(hidden, first, flags(*[False] * count), predictor.noise(count, {}, CPU))
    logits = reference.model.talker.code_predictor(inputs_embeds=torch.stack([hidden[:1], first[:1]], 1)).logits[0, -1]
    sorted_logits, order = logits.topk(50)
    probs = sorted_logits.softmax(0)
    kept = probs * (probs.cumsum(0) - probs < 0.8)
    want = torch.zeros_like(logits).index_add_(0, order, kept / kept.sum())
    got = torch.bincount(codes[:, 0], minlength=len(want)) / count
    assert set(got.nonzero().flatten().tolist()) <= set(want.nonzero().flatten().tolist())
    assert (got - want).abs().sum() < 0.12


@torch.inference_mode()
def test_seeds_and_greedy_rows_do_not_touch_each_other(
    predictor: CodePredictor, inputs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    def run(rows: list[int], greedy: list[bool], seeds: dict[int, int]) -> torch.Tensor:
        generators = {row: torch.Generator().manual_seed(seed) for row, seed in seeds.items()}
        noise = predictor.noise(len(rows), generators, CPU)
        return predictor(inputs[0][rows], inputs[1][rows], flags(*greedy), noise)[0]

    mixed = run([0, 1, 2, 3], [True, False, False, False], {1: 7, 2: 8})
    assert torch.equal(mixed[0], run([0], [True], {})[0])
    assert torch.equal(mixed[1], run([1], [False], {0: 7})[0])
    assert torch.equal(mixed[2], run([2], [False], {0: 8})[0])
    assert not torch.equal(mixed[1], run([1], [False], {0: 9})[0])
