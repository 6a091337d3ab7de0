"""Inputs of decode steps that are moved on: bit for bit what vLLM prepares for the same step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ar_support import Stage, StageSet
from tests.ar_toy import save_talker
from tests.worker.test_talker import case, check, params, prompt_of
from vllm_omni.worker.decode_inputs import DecodeInputs
from vllm_omni.worker.model_runner import VllmModelRunner


def tensors(runner: Any, prepared: Any) -> dict[str, torch.Tensor]:
    """What a step reads of what was prepared."""
    count = runner.input_batch.num_reqs
    found = {
        "lengths": runner.seq_lens,
        "lengths on the host": runner.optimistic_seq_lens_cpu,
        "positions": runner.positions[:count],
        "starts": runner.query_start_loc.gpu,
        "starts on the host": runner.query_start_loc.cpu,
        "discarded": runner.discard_request_mask.gpu[:count],
        "sampled rows": prepared[0],
        "slots": runner.input_batch.block_table[0].slot_mapping.gpu,
        "blocks": runner.input_batch.block_table[0].block_table.gpu[:count],
    }
    if runner.uses_mrope:
        found["rotary positions"] = runner.mrope_positions.gpu[:, :count]
    assert prepared[1:] == (None, 1)
    return {name: value.clone() for name, value in found.items()}


@contextmanager
def compared(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Checks every step that is moved on against vLLM's preparation of it; gives the sizes of their batches."""
    runner, moved = stage.runner, []
    follow = DecodeInputs.follow

    def both(self: DecodeInputs, scheduled: Any) -> Any:
        prepared = follow(self, scheduled)
        if prepared is not None:
            got = tensors(runner, prepared)
            batch = runner.input_batch
            tokens = [scheduled.num_scheduled_tokens[name] for name in batch.req_ids]
            again = VllmModelRunner._prepare_inputs(runner, scheduled, np.array(tokens, dtype=np.int32))
            for name, want in tensors(runner, again).items():
                assert torch.equal(got[name], want), name
            moved.append(batch.num_reqs)
        return prepared

    with monkeypatch.context() as patch:
        patch.setattr(DecodeInputs, "follow", both)
        yield moved


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("talker")
    return folder, *save_talker(folder)


@pytest.fixture(scope="module")
def stage(talker: tuple[Path, Any, Any], start_stage: StageSet) -> Stage:
    """Prompts go in parts, blocks are small, and the three requests below do not fit at once."""
    return start_stage(
        talker[0], model_arch="BatchedToyTalker", model_stage="talker", max_num_batched_tokens=16, block_size=32,
        num_gpu_blocks_override=6, max_model_len=128,
    )  # fmt: skip


def test_requests_come_and_go(talker: tuple[Path, Any, Any], stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of different lengths that begin and end at different steps, some of them preempted."""
    cases = [(case(seed, length, rows=9), steps) for seed, length, steps in ((1, 5, 70), (2, 21, 60), (3, 33, 20))]
    preempted = []
    with compared(stage, monkeypatch) as moved:
        results = []
        for number, ((prompt, cond), steps) in enumerate(cases):
            results.append(stage.add(f"r{number}", prompt_of(prompt, cond=cond), params(steps)))
            for _ in range(4):
                stage.step()
        stage.run(until=lambda: preempted.extend(r for r in stage.scheduler.waiting if r.num_preemptions) or not (
            stage.scheduler.has_requests()))  # fmt: skip
    for ((prompt, cond), steps), result in zip(cases, results, strict=True):
        check(talker, result, prompt, cond, steps)
    assert preempted
    assert {1, 2} <= set(moved)
    assert len(moved) > 50


def test_a_request_that_waits(talker: tuple[Path, Any, Any], stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request waits for its conditioning while the other goes on, and goes on with it after that."""
    (prompt, cond), (other, other_cond) = case(7, 9, rows=6), case(8, 12, rows=6)
    with compared(stage, monkeypatch) as moved:
        result = stage.add("w", {**prompt_of(prompt, cond=cond[:2]), "conditioning_steps": 2}, params(30), last=False)
        beside = stage.add("b", prompt_of(other, cond=other_cond), params(36))
        for _ in range(12):
            stage.step()
        waited = len(result.tokens)
        stage.chunk("w", {"additional_information": {"cond": cond[2:]}, "conditioning_steps": 4}, 1, last=True)
        stage.run()
    assert waited < 5
    check(talker, result, prompt, cond, 30)
    check(talker, beside, other, other_cond, 36)
    assert {1, 2} <= set(moved)


def test_a_dummy_run_between(talker: tuple[Path, Any, Any], stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step after one that used the same tensors for something else is prepared by vLLM."""
    prompt, cond = case(5, 9, rows=6)
    with compared(stage, monkeypatch) as moved:
        result = stage.add("d", prompt_of(prompt, cond=cond), params(20))
        stage.run(until=lambda: len(moved) == 5)
        with torch.inference_mode():
            stage.runner._dummy_run(4)
        before = len(moved)
        stage.step()
        assert len(moved) == before
        stage.run()
    check(talker, result, prompt, cond, 20)
    assert len(moved) > before


def test_rows_beyond_the_batch_stay(talker: tuple[Path, Any, Any], stage: Stage) -> None:
    """A graph of more rows than the batch has leaves the others alone, whatever stands in their positions."""
    runner = stage.runner
    prompt, cond = case(6, 9, rows=6)
    result = stage.add("p", prompt_of(prompt, cond=cond), params(12))
    decode = runner._decode_inputs
    stage.run(until=lambda: len(result.tokens) == 4)
    runner.positions[1:4] = 10**6
    before = runner.seq_lens.clone(), runner.positions[:4].clone()
    run = decode._run

    decode._run = lambda rows: decode._move(4)
    try:
        stage.step()
    finally:
        decode._run = run
    assert torch.equal(runner.seq_lens - before[0], (torch.arange(len(before[0])) == 0).int())
    assert torch.equal(runner.positions[:4] - before[1], torch.tensor([1, 0, 0, 0]))
    assert (runner.input_batch.block_table[0].slot_mapping.gpu[1:4] == -1).all()
    runner.positions[1:4] = 0
    stage.run()
    check(talker, result, prompt, cond, 12)
