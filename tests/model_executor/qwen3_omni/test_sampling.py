"""The talker samples its tokens itself where it can: the same speech as with vLLM's sampler, step by step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from tests.ar_support import Result, Stage, StageSet
from tests.model_executor.qwen3_omni.support import Reference
from tests.model_executor.qwen3_omni.test_talker import payload
from vllm_omni.model_executor.layers.sampling import TokenSampler
from vllm_omni.worker.sampling import RequestSampler, is_known

FRAMES = 36
WAYS = [
    pytest.param({"enforce_eager": eager, "async_scheduling": ahead}, id=f"{'eager' if eager else 'graphs'}-{name}")
    for eager in (True, False)
    for ahead, name in ((False, "sync"), (True, "async"))
]


def talker_stage(start_stage: StageSet, checkpoint: Path, **values: Any) -> Stage:
    return start_stage(
        checkpoint,
        stage_id=1,
        model_stage="talker",
        model_arch="Qwen3OmniTalkerForConditionalGeneration",
        hf_config_name="talker_config",
        skip_tokenizer_init=True,
        max_model_len=192,
        **values,
    )


@pytest.fixture(scope="module")
def talker(start_stage: StageSet, checkpoint: Path) -> Stage:
    """Prompts go in parts, and the KV cache does not hold three requests to their end."""
    return talker_stage(
        start_stage,
        checkpoint,
        max_num_batched_tokens=32,
        enable_chunked_prefill=True,
        block_size=32,
        num_gpu_blocks_override=7,
    )


def params(frames: int = FRAMES, **values: Any) -> SamplingParams:
    """Greedy, with a penalty that changes what is said."""
    defaults = {"temperature": 0.0, "repetition_penalty": 3.0, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**{**defaults, "max_tokens": frames, **values})


def speak(stage: Stage, config: Any, name: str, late: bool = False, **values: Any) -> list[Result]:
    """Three requests of different lengths, all asking for ``values``. With ``late``, requests that only vLLM can
    sample join for a while, twice."""
    results = [stage.add(f"{name}{i}", payload(config, i, 20 + 9 * i), params(FRAMES + i, **values)) for i in range(3)]
    if late:
        for at in (6, 14):
            stage.run(until=lambda at=at: len(results[0].tokens) >= at)
            stage.add(f"{name} late{at}", payload(config, 9), params(3, presence_penalty=0.5))
    stage.run()
    return results


def check_same(got: list[Result], want: list[Result]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.error is None
        assert a.tokens == b.tokens
        assert torch.equal(torch.stack(a.steps("codes")), torch.stack(b.steps("codes")))
        assert [int(codes[0]) for codes in a.steps("codes")] == a.tokens


def check_stage(stage: Stage, config: Any) -> set[str]:
    """Alone with the model's sampling, with vLLM's (asked for by a bias of nothing), and changing sides in between.
    Returns the requests that were preempted."""
    sides: list[bool] = []
    preempted: set[str] = set()
    choosing = stage.runner._choosing
    arrange = choosing.arrange

    def look(live: Any) -> None:
        sides.append(choosing.own)
        preempted.update(r.request_id for r in stage.scheduler.requests.values() if r.num_preemptions)
        arrange(live)

    choosing.arrange = look
    try:
        theirs = speak(stage, config, "theirs", logit_bias={0: 0.0})
        assert not any(sides)
        sides.clear()
        ours = speak(stage, config, "ours")
        assert all(sides)
        sides.clear()
        mixed = speak(stage, config, "mixed", late=True)
        assert {True, False} <= set(sides)
    finally:
        del choosing.arrange
    free = speak(stage, config, "free", repetition_penalty=1.0)
    assert free[0].tokens != ours[0].tokens, "the penalty must bear on what is said"
    check_same(ours, theirs)
    check_same(mixed, theirs)
    return preempted


def test_the_same_speech_as_with_vllms_sampler(talker: Stage, reference: Reference) -> None:
    preempted = check_stage(talker, reference.config)
    assert {name.rstrip("012") for name in preempted} >= {"theirs", "ours", "mixed"}
    assert sorted(talker.runner._choosing._free) == list(range(talker.runner.max_num_reqs)), "slots are given back"


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_the_same_speech_on_a_gpu(
    start_stage: StageSet, checkpoint: Path, reference: Reference, way: dict[str, Any]
) -> None:
    check_stage(talker_stage(start_stage, checkpoint, **way), reference.config)


def test_minimum_of_tokens(talker: Stage, reference: Reference) -> None:
    """The token that greedy speech says early is barred until then, as vLLM does it."""
    (free,) = talker.ask([payload(reference.config, 4)], params())
    asked = {"min_tokens": 9, "stop_token_ids": [free.tokens[3]]}
    results = [
        talker.ask([payload(reference.config, 4)], params(**asked, **more))[0]
        for more in ({}, {"logit_bias": {0: 0.0}})
    ]
    check_same(results[:1], results[1:])
    assert free.tokens[3] not in results[0].tokens[:9]
    assert len(results[0].tokens) > 9


def test_late_text_that_is_wrong_fails_alone(talker: Stage, reference: Reference) -> None:
    (want,) = talker.ask([payload(reference.config, 2)], params())
    good = talker.add("good", payload(reference.config, 2), params())
    bad = talker.add("bad", {**payload(reference.config, 3), "conditioning_steps": 5}, params(), last=False)
    talker.run(until=lambda: len(bad.tokens) >= 4)
    wrong = {"additional_information": {"text": torch.zeros(2, 3)}, "conditioning_steps": 2}
    talker.chunk("bad", wrong, 1, last=True)
    talker.run()
    assert type(bad.error).__name__ == "RequestError"
    check_same([good], [want])


@pytest.mark.parametrize(
    "values",
    [
        {"logprobs": 1}, {"prompt_logprobs": 1}, {"logprob_token_ids": [3]}, {"min_p": 0.1}, {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1}, {"logit_bias": {3: 1.0}}, {"allowed_token_ids": [1, 2]}, {"bad_words": ["a"]},
        {"structured_outputs": StructuredOutputsParams(regex="a")}, {"seed": 3}, {"thinking_token_budget": 3},
    ],
    ids=lambda values: next(iter(values)),
)  # fmt: skip
def test_what_vllm_must_sample(values: dict[str, Any]) -> None:
    assert not is_known(SamplingParams(temperature=0.8, **values))


def test_what_the_model_samples() -> None:
    known = {"top_k": 5, "top_p": 0.5, "repetition_penalty": 1.2, "min_tokens": 2, "stop_token_ids": [4], "n": 1}
    assert is_known(SamplingParams(temperature=0.8, **known))
    assert is_known(SamplingParams(temperature=0.0, seed=3))


def test_tokens_that_vllm_has_not_seen_are_restored() -> None:
    """Under asynchronous scheduling vLLM notes -1 for tokens of steps that it did not sample."""
    tokens = TokenSampler(2, 20, 8)
    sampler = RequestSampler(tokens, SimpleNamespace(use_fp64_gumbel=False))
    asked = SamplingParams(temperature=0.0, repetition_penalty=1.2)
    requests = {
        name: SimpleNamespace(req_id=name, sampling_params=asked, output_token_ids=[], num_prompt_tokens=2)
        for name in ("a", "b")
    }
    outputs: list[list[int]] = [[], []]
    batch: Any = SimpleNamespace(
        req_ids=["b", "a"],
        req_id_to_index={"b": 0, "a": 1},
        token_ids_cpu=np.array([[1, 2, 0], [3, 4, 0]], dtype=np.int32),
        sampling_metadata=SimpleNamespace(output_token_ids=outputs),
        logitsprocs=SimpleNamespace(all=[]),
    )
    scheduled: Any = SimpleNamespace(
        finished_req_ids=set(),
        preempted_req_ids=None,
        scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in requests],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
    )
    sampler.update(scheduled, batch, requests)
    assert sampler.own
    sampler.arrange([True, True])
    for said in ([5, 6], [7, 8], [9, 10]):
        tokens.keep(torch.tensor(said))
        for output in outputs:
            output.append(-1)
    sampler.restore(batch)
    assert outputs == [[5, 7, 9], [6, 8, 10]]
