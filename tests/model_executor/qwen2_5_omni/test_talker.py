"""The talker alone: chunked prompts, preemption, aborts, wrong payloads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5OmniConfig
from vllm.sampling_params import SamplingParams

from tests.ar_support import Result, Stage, StageSet
from tests.model_executor.qwen2_5_omni.support import ENDS, PENALTY
from vllm_omni.errors import RequestError
from vllm_omni.inputs.edge import EdgeInput
from vllm_omni.model_executor.stage_input_processors.qwen2_5_omni import thinker2talker
from vllm_omni.model_executor.tiny_models.qwen2_5_omni import HIDDEN

CODES = 40
GREEDY = SamplingParams(
    temperature=0.0, repetition_penalty=PENALTY, max_tokens=CODES, stop_token_ids=ENDS, detokenize=False
)
ARGS = {
    "model_stage": "talker",
    "model_arch": "Qwen2_5OmniTalkerForConditionalGeneration",
    "hf_config_name": "talker_config",
    "skip_tokenizer_init": True,
}


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> Any:
    return Qwen2_5OmniConfig.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def stage(start_stage: StageSet, checkpoint: Path) -> Stage:
    return start_stage(checkpoint, **ARGS)


@pytest.fixture(scope="module")
def tight(start_stage: StageSet, checkpoint: Path) -> Stage:
    """Prompts in pieces of 8 tokens, and a KV cache for two of three requests."""
    return start_stage(
        checkpoint, **ARGS, max_num_batched_tokens=8, num_gpu_blocks_override=6, block_size=32, max_model_len=128
    )


def thinker_outputs(config: Any, seed: int, length: int, reply: int) -> list[dict[str, Any]]:
    """What a thinker sends: noise for its rows."""
    generator = torch.Generator().manual_seed(seed)

    def rows(start: int, count: int) -> dict[str, Any]:
        states = torch.randn(2, count, HIDDEN, generator=generator)
        positions = torch.arange(start, start + count)[:, None].expand(-1, 3)
        return {"start": start, "hidden.0": states[0], "hidden.-1": states[1], "positions": positions}

    prompt = [int(t) for t in torch.randint(0, 200, (length,), generator=generator)]
    prompt[3] = config.thinker_config.image_token_index
    first = {"token_ids": [1], "prompt_token_ids": prompt, **rows(0, length)}
    return [first, *({"token_ids": [2 + i], **rows(length + i, 1)} for i in range(reply))]


def prompts_of(config: Any, outputs: list[dict[str, Any]], piece: int | None) -> list[dict[str, Any]]:
    """The edge's chunks of ``outputs``, ``piece`` outputs a call."""
    piece = piece or len(outputs)
    carry: dict[str, Any] = {}
    chunks = []
    for begin in range(0, len(outputs), piece):
        last = begin + piece >= len(outputs)
        part = outputs[begin : begin + piece]
        chunks.append(thinker2talker(EdgeInput("r", {0: part}, "hi", None, last=last, carry=carry, config=config)))
    return [chunk for chunk in chunks if chunk is not None]


def codes_of(stage: Stage, config: Any, seeds: tuple[int, ...], length: int = 20, reply: int = 12) -> list[list[int]]:
    prompts = [prompts_of(config, thinker_outputs(config, seed, length, reply), None)[0] for seed in seeds]
    results = stage.ask(prompts, GREEDY)
    assert [result.error for result in results] == [None] * len(seeds)
    return [result.tokens for result in results]


def test_a_prompt_in_pieces_and_preemption_change_nothing(stage: Stage, tight: Stage, config: Any) -> None:
    alone = [codes_of(stage, config, (seed,))[0] for seed in (1, 2, 3)]
    assert all(len(set(codes)) > CODES // 2 for codes in alone)
    before = tight.num_steps
    assert codes_of(tight, config, (1, 2, 3)) == alone
    plain = 3 * 22 // 8 + CODES
    assert tight.num_steps - before > plain + 10, "no request was preempted"


@pytest.mark.parametrize("piece", [1, 5])
def test_streamed_rows_wait_for_each_other(stage: Stage, config: Any, piece: int) -> None:
    """The talker never runs ahead of the thinker, and gives the codes of the whole."""
    (want,) = codes_of(stage, config, (4,))
    first, *later = prompts_of(config, thinker_outputs(config, 4, 20, 12), piece)
    name = f"stream-{piece}"
    result = stage.add(name, first, GREEDY, last=False)
    sent = first["conditioning_steps"]
    for number, chunk in enumerate(later, 1):
        for _ in range(6):
            stage.step()
        assert len(result.tokens) <= sent + 1
        stage.chunk(name, chunk, number, last=number == len(later))
        sent += chunk["conditioning_steps"]
    stage.run()
    assert result.tokens == want
    assert sent == 11


def test_text_end_comes_after_the_last_row(stage: Stage, config: Any) -> None:
    """Replies that differ in their last row alone differ from there on."""
    outputs = thinker_outputs(config, 5, 20, 6)
    (want,) = stage.ask([prompts_of(config, outputs, None)[0]], GREEDY)
    (shorter,) = stage.ask([prompts_of(config, outputs[:-1], None)[0]], GREEDY)
    same = next(i for i, (a, b) in enumerate(zip(want.tokens, shorter.tokens, strict=True)) if a != b)
    assert same >= 4, "steps before the fifth row have the same conditioning"
    assert same < CODES - 1


def test_aborts_leave_the_others_alone(stage: Stage, config: Any) -> None:
    (want,) = codes_of(stage, config, (6,))
    prompts = [prompts_of(config, thinker_outputs(config, seed, 20, 12), None)[0] for seed in (6, 7, 8)]
    results = [stage.add(f"abort-{i}", prompt, GREEDY) for i, prompt in enumerate(prompts)]
    stage.run(until=lambda: len(results[1].tokens) > 5)
    stage.abort("abort-1")
    stage.run(until=lambda: len(results[2].tokens) > 20)
    stage.abort("abort-2")
    stage.run()
    assert results[0].tokens == want
    stage.step()
    assert not stage.runner.omni_states


def wrong(**changes: Any) -> dict[str, Any]:
    return changes


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (wrong(speaker="nobody"), "speaker"),
        (wrong(positions=torch.zeros(3, 3)), "positions"),
        (wrong(prompt_hidden=torch.zeros(2, HIDDEN)), "prompt_hidden"),
        (wrong(prompt_embeds="text"), "prompt_embeds"),
        (wrong(reply_hidden=[]), "reply_hidden"),
        (wrong(reply_embeds=[torch.zeros(1, HIDDEN + 1)]), "reply_embeds"),
        (wrong(prompt_token_ids=[1, 2]), "prompt_token_ids"),
    ],
)
def test_a_wrong_payload_fails_its_request_alone(
    stage: Stage, config: Any, changes: dict[str, Any], field: str
) -> None:
    (want,) = codes_of(stage, config, (9,))
    good, bad = (prompts_of(config, thinker_outputs(config, 9, 20, 12), None)[0] for _ in range(2))
    bad["additional_information"] = {**bad["additional_information"], **changes}
    results: list[Result] = stage.ask([good, bad], GREEDY)
    assert results[0].tokens == want
    assert isinstance(results[1].error, RequestError)
    assert results[1].error.details["field"] == field


def test_a_wrong_chunk_fails_its_request_alone(stage: Stage, config: Any) -> None:
    (want,) = codes_of(stage, config, (10,))
    prompts = [prompts_of(config, thinker_outputs(config, 10, 20, 12), 6) for _ in range(2)]
    results = [stage.add(f"chunk-{i}", chunks[0], GREEDY, last=False) for i, chunks in enumerate(prompts)]
    prompts[1][1]["additional_information"]["reply_hidden"] = [torch.zeros(1, 3)]
    for number in range(1, len(prompts[0])):
        for i in (0, 1):
            stage.chunk(f"chunk-{i}", prompts[i][number], number, last=number == len(prompts[0]) - 1)
    stage.run()
    assert results[0].tokens == want
    assert results[0].error is None
    assert isinstance(results[1].error, RequestError)


def test_only_codes_and_ends_can_be_sampled(stage: Stage, config: Any) -> None:
    """Ids without an embedding in token2wav are never sampled, at any temperature."""
    for seed in range(8):
        params = SamplingParams(temperature=2.0, max_tokens=60, seed=seed, ignore_eos=True, detokenize=False)
        stage.add(f"hot-{seed}", prompts_of(config, thinker_outputs(config, seed, 20, 12), None)[0], params)
    stage.run()
    seen = {code for seed in range(8) for code in stage.results[f"hot-{seed}"].tokens}
    assert all(code <= 8193 or code in ENDS for code in seen)
    assert len(seen) > 300


def test_the_same_codes_as_with_vllms_sampler(stage: Stage, config: Any) -> None:
    """Alone with the model's sampling, with vLLM's (asked for by a bias of nothing), and changing sides in between."""
    choosing = stage.runner._choosing
    prompts = [prompts_of(config, thinker_outputs(config, seed, 20 + seed, 12), None)[0] for seed in (1, 2, 3)]
    biased = GREEDY.clone()
    biased.logit_bias = {0: 0.0}

    def codes(name: str, params: SamplingParams, late: bool = False) -> list[list[int]]:
        results = [stage.add(f"{name}{i}", prompt, params) for i, prompt in enumerate(prompts)]
        own = set()
        while stage.scheduler.has_requests():
            stage.step()
            own |= {choosing.own} if choosing._rows else set()
            if late and len(results[0].tokens) == 9:
                late = False
                short = biased.clone()
                short.max_tokens = 4
                stage.add(f"{name} late", prompts[0], short)
        sides[name] = own
        return [result.tokens for result in results]

    sides: dict[str, set[bool]] = {}
    want = codes("theirs", biased)
    assert codes("ours", GREEDY) == want
    assert codes("mixed", GREEDY, late=True) == want
    assert sides == {"theirs": {False}, "ours": {True}, "mixed": {True, False}}
