"""A stage that is fed embeddings and makes several codes a step: equal to plain torch however it is scheduled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams

from tests.ar_models import HIDDEN
from tests.ar_support import Result, Stage, StageSet
from tests.ar_toy import save_talker, talk

Talker = tuple[Path, Any, Any]
LENGTHS = (5, 21, 33)


def params(steps: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True, detokenize=False)


def case(seed: int, length: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, HIDDEN, generator=generator), torch.randn(rows, HIDDEN, generator=generator)


def prompt_of(prompt: torch.Tensor, **information: Any) -> dict[str, Any]:
    return {"prompt_token_ids": [0] * len(prompt), "additional_information": {"prompt": prompt, **information}}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Talker:
    folder = tmp_path_factory.mktemp("talker")
    return folder, *save_talker(folder)


@pytest.fixture(scope="module")
def stage(talker: Talker, start_stage: StageSet) -> Stage:
    return start_stage(talker[0], model_arch="ToyTalker", model_stage="talker")


def check(talker: Talker, result: Result, prompt: torch.Tensor, cond: torch.Tensor, steps: int) -> None:
    tokens, codes = talk(talker[1], talker[2], prompt, cond, steps)
    assert result.error is None
    assert result.tokens == tokens
    assert torch.equal(torch.stack(result.steps("codes")), codes)


def run_cases(talker: Talker, stage: Stage, steps: int = 12) -> None:
    cases = [case(seed, length, rows=9) for seed, length in enumerate(LENGTHS)]
    results = stage.ask([prompt_of(prompt, cond=cond) for prompt, cond in cases], params(steps))
    for (prompt, cond), result in zip(cases, results, strict=True):
        check(talker, result, prompt, cond, steps)


def test_codes(talker: Talker, stage: Stage) -> None:
    run_cases(talker, stage)
    assert not stage.runner.omni_states


def test_batched_decode_hook(talker: Talker, start_stage: StageSet) -> None:
    stage = start_stage(talker[0], model_arch="BatchedToyTalker", model_stage="talker")
    run_cases(talker, stage)
    assert stage.model.calls > 5


def test_chunked_prefill(talker: Talker, start_stage: StageSet) -> None:
    stage = start_stage(talker[0], model_arch="ToyTalker", model_stage="talker", max_num_batched_tokens=8)
    run_cases(talker, stage)


def test_preemption(talker: Talker, start_stage: StageSet) -> None:
    """Three requests and memory for about two: what is preempted is computed again and gives the same codes."""
    stage = start_stage(
        talker[0], model_arch="ToyTalker", model_stage="talker", hidden_layers=(0, -1), num_gpu_blocks_override=7,
        block_size=32, max_model_len=128,
    )  # fmt: skip
    preempted = []
    run_cases(talker, stage, steps=3)
    before = stage.num_steps
    cases = [case(seed, 30, rows=50) for seed in range(3)]
    results = [stage.add(f"p{i}", prompt_of(prompt, cond=cond), params(50)) for i, (prompt, cond) in enumerate(cases)]
    while stage.scheduler.has_requests():
        stage.step()
        preempted += [r for r in stage.scheduler.requests.values() if r.num_preemptions]
    assert preempted
    assert stage.num_steps - before > 60
    for (prompt, cond), result in zip(cases, results, strict=True):
        check(talker, result, prompt, cond, 50)
        assert result.rows("hidden.-1").shape == (79, HIDDEN)
        expected = talker[2].cond_proj(prompt)
        torch.testing.assert_close(result.rows("hidden.0")[:30], expected)


def test_streamed_conditioning(talker: Talker, stage: Stage) -> None:
    """Requests whose conditioning comes in chunks at different rates: same codes, and no step runs ahead."""
    cases = [case(seed + 10, length, rows=10) for seed, length in enumerate(LENGTHS)]
    results = []
    for i, (prompt, cond) in enumerate(cases):
        first = {**prompt_of(prompt, cond=cond[:1]), "conditioning_steps": 1}
        results.append(stage.add(f"s{i}", first, params(16), last=False))
    sent, number = [1, 1, 1], [0, 0, 0]
    for tick in range(60):
        for i, (_, cond) in enumerate(cases):
            if tick % (i + 2) == 0 and sent[i] <= len(cond) and (number[i] == 0 or sent[i] < len(cond)):
                end = min(sent[i] + i + 1, len(cond))
                number[i] += 1
                piece = {"additional_information": {"cond": cond[sent[i] : end]}, "conditioning_steps": end - sent[i]}
                stage.chunk(f"s{i}", piece, number[i], last=end == len(cond))
                sent[i] = end
        stage.step()
        for i, result in enumerate(results):
            if sent[i] < 10:
                assert len(result.tokens) <= sent[i] + 1
    stage.run()
    for (prompt, cond), result in zip(cases, results, strict=True):
        check(talker, result, prompt, cond, 16)


def test_preempted_while_gated(talker: Talker, stage: Stage) -> None:
    """A request that waits for conditioning and loses its memory does not run ahead when it comes back."""
    prompt, cond = case(30, 20, rows=6)
    first = {**prompt_of(prompt, cond=cond[:2]), "conditioning_steps": 2}
    result = stage.add("g", first, params(10), last=False)
    for _ in range(8):
        stage.step()
    assert len(result.tokens) == 3
    assert stage.scheduler.reset_prefix_cache(reset_running_requests=True)
    for _ in range(4):
        stage.step()
    assert len(result.tokens) == 3
    stage.chunk("g", {"additional_information": {"cond": cond[2:]}, "conditioning_steps": 4}, 1, last=True)
    stage.run()
    check(talker, result, prompt, cond, 10)


def test_no_steps_while_all_wait(talker: Talker, stage: Stage) -> None:
    """An engine whose requests all wait for conditioning has no work, and keeps them in its batch; one that runs, an
    abort and a chunk are work."""
    (prompt, cond), (other, other_cond) = case(31, 20, rows=6), case(32, 7, rows=6)
    first = {**prompt_of(prompt, cond=cond[:2]), "conditioning_steps": 2}
    result = stage.add("n", first, params(10), last=False)
    stage.run()  # as far as it goes
    assert len(result.tokens) == 3
    assert stage.runner.input_batch.req_ids == ["n"]
    beside = stage.add("b", prompt_of(other, cond=other_cond), params(5))
    stage.run()
    check(talker, beside, other, other_cond, 5)
    stage.add("gone", first, params(10), last=False)
    stage.run()
    stage.abort("gone")
    assert stage.scheduler.has_requests()
    stage.run()
    assert list(stage.runner.omni_states) == ["n"]
    stage.chunk("n", {"additional_information": {"cond": cond[2:]}, "conditioning_steps": 4}, 1, last=True)
    assert stage.scheduler.has_requests()
    stage.run()
    check(talker, result, prompt, cond, 10)
    assert not stage.runner.omni_states


def test_end_without_rows(talker: Talker, stage: Stage) -> None:
    """The last chunk may bring nothing but the end; steps go on with the model's padding."""
    prompt, cond = case(40, 9, rows=3)
    result = stage.add("e", {**prompt_of(prompt, cond=cond), "conditioning_steps": 3}, params(8), last=False)
    for _ in range(10):
        stage.step()
    assert len(result.tokens) == 4
    stage.chunk("e", {"additional_information": {}}, 1, last=True)
    stage.run()
    check(talker, result, prompt, cond, 8)


def test_late_chunks_and_abort(talker: Talker, stage: Stage) -> None:
    """A chunk for a request that is gone is dropped; an aborted one leaves nothing and disturbs nobody."""
    prompt, cond = case(50, 9, rows=4)
    stage.chunk("never", {"additional_information": {"cond": cond}, "conditioning_steps": 4}, 1, last=True)
    kept = stage.add("kept", prompt_of(prompt, cond=cond), params(9))
    gone = stage.add("gone", {**prompt_of(prompt, cond=cond), "conditioning_steps": 4}, params(9), last=False)
    for _ in range(3):
        stage.step()
    stage.abort("gone")
    stage.chunk("gone", {"additional_information": {"cond": cond}, "conditioning_steps": 4}, 1, last=True)
    stage.run()
    stage.step()
    check(talker, kept, prompt, cond, 9)
    assert not gone.finished
    assert not stage.scheduler._streams
    assert not stage.scheduler._unseen
    assert not stage.runner.omni_states
    again = stage.add("gone", prompt_of(prompt, cond=cond), params(9))
    stage.run()
    check(talker, again, prompt, cond, 9)


@pytest.mark.parametrize(
    ("information", "words"),
    [
        ({}, "no 'prompt'"),
        ({"prompt": torch.zeros(9, 5)}, "shape"),
        ({"prompt": "text"}, "str"),
        ({"prompt": torch.zeros(9, HIDDEN), "cond": torch.zeros(2, 3)}, "shape"),
    ],
)
def test_bad_payload_fails_alone(talker: Talker, stage: Stage, information: dict[str, Any], words: str) -> None:
    prompt, cond = case(60, 9, rows=4)
    good = stage.add("good", prompt_of(prompt, cond=cond), params(9))
    bad = stage.add("bad", {"prompt_token_ids": [0] * 9, "additional_information": information}, params(9))
    stage.run()
    assert type(bad.error).__name__ == "RequestError"
    assert words in str(bad.error)
    check(talker, good, prompt, cond, 9)


def test_damaged_payload_fails_alone(talker: Talker, stage: Stage) -> None:
    prompt, cond = case(61, 9, rows=4)
    good = stage.add("good", prompt_of(prompt, cond=cond), params(9))
    assert stage.inputs is not None
    request, _ = stage.inputs.omni_request("bad", prompt_of(prompt), params(9))
    request.sampling_params.extra_args["omni"][0] = [b"\xff\xff\xff\x7f nonsense"]
    bad = stage.results["bad"] = Result()
    stage.outputs.add_request(request, None)
    stage.client.add_request(request)
    stage.run()
    assert type(bad.error).__name__ == "ConnectorError"
    check(talker, good, prompt, cond, 9)


def test_shared_memory_is_given_back(talker: Talker, stage: Stage) -> None:
    """Large tensors lie in shared memory while they are needed and not longer, also when a request is aborted."""
    prompt, cond = case(70, 200, rows=200)
    stage.codec.threshold = 4096
    try:
        arena = stage.codec.arena
        assert arena is not None
        done = stage.add("done", prompt_of(prompt, cond=cond), params(4))
        stage.add("aborted early", prompt_of(prompt, cond=cond), params(4))
        stage.abort("aborted early")
        assert arena.stats()["busy"] == 4
        stage.run()
        stage.chunk("too late", {"additional_information": {"cond": cond}}, 1, last=True)
        stage.run()
        stage.add("flush", prompt_of(prompt[:5]), params(1))
        stage.run()
        arena.reap()
        assert arena.stats()["busy"] == 0
        check(talker, done, prompt, cond, 4)
    finally:
        stage.codec.threshold = 65536
