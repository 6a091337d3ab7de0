"""The same stages on a GPU: CUDA graphs or eager, asynchronous scheduling or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ar_models import save_lm
from tests.ar_support import Stage, StageSet
from tests.ar_toy import save_talker
from tests.worker.test_decode_inputs import compared
from tests.worker.test_hidden_states import GREEDY, LAYERS, PROMPTS, reference
from tests.worker.test_talker import case, check, params, prompt_of, run_cases

pytestmark = pytest.mark.gpu
WAYS = [
    pytest.param({"enforce_eager": eager, "async_scheduling": ahead}, id=f"{'eager' if eager else 'graphs'}-{name}")
    for eager in (True, False)
    for ahead, name in ((False, "sync"), (True, "async"))
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("lm")
    return folder, save_lm(folder, "qwen3")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("talker")
    return folder, *save_talker(folder)


@pytest.mark.parametrize("way", WAYS)
def test_hidden_states(lm: tuple[Path, Any], start_stage: StageSet, way: dict[str, Any]) -> None:
    """Rows of prompt and tokens, with prefill in parts; the embeddings are not what the first norm left of them."""
    stage = start_stage(lm[0], hidden_layers=LAYERS, max_num_batched_tokens=16, max_num_seqs=4, **way)
    assert stage.config.scheduler_config.async_scheduling == way["async_scheduling"]
    results = stage.ask([{"prompt_token_ids": prompt} for prompt in PROMPTS], GREEDY)
    for prompt, result in zip(PROMPTS, results, strict=True):
        tokens, states = reference(lm[1], prompt, len(result.tokens))
        assert result.tokens == tokens
        for layer in LAYERS:
            torch.testing.assert_close(result.rows(f"hidden.{layer}"), states[layer], atol=5e-3, rtol=5e-3)


def talker_stage(talker: tuple[Path, Any, Any], start_stage: StageSet, arch: str, **way: Any) -> Stage:
    return start_stage(talker[0], model_arch=arch, model_stage="talker", max_num_seqs=4, **way)


@pytest.mark.parametrize("way", WAYS)
def test_inputs_that_are_moved_on(
    talker: tuple[Path, Any, Any], start_stage: StageSet, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decode steps read is what vLLM prepares for them; three requests run in the graph of four rows."""
    stage = talker_stage(talker, start_stage, "BatchedToyTalker", **way)
    with compared(stage, monkeypatch) as moved:
        run_cases(talker, stage)
    assert moved.count(3) > 5
    assert stage.runner._decode_inputs._run.sizes == ([] if way["enforce_eager"] else [1, 2, 4])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ["ToyTalker", "BatchedToyTalker"])
def test_codes(talker: tuple[Path, Any, Any], start_stage: StageSet, arch: str, way: dict[str, Any]) -> None:
    stage = talker_stage(talker, start_stage, arch, **way)
    run_cases(talker, stage)
    prompt, cond = case(40, 9, rows=6)
    result = stage.add("s", {**prompt_of(prompt, cond=cond[:2]), "conditioning_steps": 2}, params(8), last=False)
    for _ in range(12):
        stage.step()
    assert len(result.tokens) == 3
    stage.chunk("s", {"additional_information": {"cond": cond[2:]}, "conditioning_steps": 4}, 1, last=True)
    stage.run()
    check(talker, result, prompt, cond, 8)
    assert not stage.runner.omni_states
