"""What is decided about a request before any stage sees it."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from vllm_omni.config.stage import load_stage_configs
from vllm_omni.engine.stage_engine import StageInfo
from vllm_omni.entrypoints.entry import check_information, entry_options, information_keys
from vllm_omni.entrypoints.omni_args import STAGE_CONFIGS
from vllm_omni.entrypoints.orchestrator import Orchestrator
from vllm_omni.entrypoints.params import default_params, each, params_for, read_params, text_stages
from vllm_omni.entrypoints.stage_graph import StageGraph, StageNode
from vllm_omni.errors import ConfigError, RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.inputs.edge import EdgeInput, pass_on, reads
from vllm_omni.model_executor.stage_input_processors.qwen2_5_omni import talker2token2wav
from vllm_omni.model_executor.stage_input_processors.qwen3_omni import talker2code2wav
from vllm_omni.model_executor.voices import check_speaker, voices_of
from vllm_omni.request import OmniRequest

PIPELINE = load_stage_configs(STAGE_CONFIGS / "qwen3_omni_moe.yaml")
DEFAULTS = default_params(PIPELINE)
TEXT = text_stages(PIPELINE)
END = 2150
ADAPTER = LoRARequest("a", 1, "/somewhere")


def test_one_set_is_for_the_stage_that_reads_and_writes_text() -> None:
    """The talker keeps what makes it speak to its end."""
    given = SamplingParams(temperature=0.0, max_tokens=5)
    params = params_for(DEFAULTS, given, text=TEXT)
    assert params[0] is given
    assert params[1] is DEFAULTS[1]
    assert params[2] is DEFAULTS[2]


def test_without_a_text_stage_one_set_is_for_all_of_its_class() -> None:
    given = SamplingParams(max_tokens=5)
    assert params_for(DEFAULTS, given) == {0: given, 1: params_for(DEFAULTS, given)[1], 2: given}
    picture = OmniDiffusionSamplingParams(height=64)
    assert params_for({0: OmniDiffusionSamplingParams(), 1: DEFAULTS[0]}, picture, text=[1])[0] is picture


def test_without_a_stage_that_reads_the_one_that_writes_text_is_meant() -> None:
    stages = tuple(replace(stage, is_comprehension=False) for stage in PIPELINE.stages)
    assert text_stages(PIPELINE) == text_stages(replace(PIPELINE, stages=stages)) == {0}


def test_what_ends_a_stage_s_output_is_never_dropped() -> None:
    talker = SamplingParams(temperature=0.9, max_tokens=4096, stop_token_ids=[7])
    params = params_for(DEFAULTS, [DEFAULTS[0], talker, DEFAULTS[2]], text=TEXT)
    assert params[1].stop_token_ids == [7, END]
    assert params[1].all_stop_token_ids == {7, END}
    assert params[1].temperature == 0.9
    assert talker.stop_token_ids == [7]
    assert talker.all_stop_token_ids == {7}
    longer = SamplingParams(max_tokens=10, ignore_eos=True)
    assert params_for(DEFAULTS, [DEFAULTS[0], longer, DEFAULTS[2]])[1] is longer


@pytest.mark.parametrize(
    ("name", "value", "field", "words"),
    [
        ("max_tokens", 0, "max_tokens", "at least 1"),
        ("temperature", -1.0, "temperature", "non-negative"),
        ("temperature", "hot", "sampling_params", "'<' not supported"),
        ("n", 3, "sampling_params", "greedy"),
    ],
)
def test_values_that_were_set_after_vllm_had_checked(name: str, value: Any, field: str, words: str) -> None:
    """For every stage, also where the stage's defaults themselves were changed."""
    wrong = SamplingParams(temperature=0.0, max_tokens=5)
    setattr(wrong, name, value)
    for defaults, given in ((DEFAULTS, [DEFAULTS[0], wrong, DEFAULTS[2]]), (DEFAULTS, wrong), ({0: wrong}, None)):
        with pytest.raises(RequestError, match=words) as caught:
            params_for(defaults, given, text=TEXT)
        assert caught.value.details["field"] == field


def test_wrong_defaults_are_the_configurations_error() -> None:
    talker = replace(PIPELINE.stages[1], default_sampling_params={"max_tokens": 0})
    with pytest.raises(ConfigError, match="stage 1: default_sampling_params: max_tokens must be at least 1"):
        default_params(replace(PIPELINE, stages=(PIPELINE.stages[0], talker)))


def read_of(edge: Any) -> dict[int, frozenset[str]]:
    """What is read of the parameters of the pipeline's last stage, which draws no tokens."""
    nodes = [StageNode(stage.stage_id, process_input=pass_on) for stage in PIPELINE.stages]
    return read_params(PIPELINE, [*nodes[:2], replace(nodes[2], process_input=edge)])


TALKER, VOCODER = DEFAULTS[1], SamplingParams(temperature=0.0, max_tokens=65536, seed=42, top_p=1.0, top_k=-1)


@pytest.mark.parametrize(
    ("edge", "given", "name"),
    [
        (talker2code2wav, VOCODER, None),
        (talker2code2wav, SamplingParams(), None),
        (talker2code2wav, DEFAULTS[2], None),
        (talker2code2wav, SamplingParams(temperature=0.4), "temperature"),
        (talker2code2wav, SamplingParams(repetition_penalty=1.1), "repetition_penalty"),
        (talker2code2wav, SamplingParams(extra_args={"num_steps": 3}), "extra_args"),
        (talker2code2wav, TALKER, "repetition_penalty"),
        (talker2token2wav, SamplingParams(seed=3, extra_args={"num_steps": 3}), None),
        (talker2token2wav, SamplingParams(top_p=0.5), "top_p"),
        (pass_on, SamplingParams(logprobs=2), "logprobs"),
        (reads("speaker")(talker2code2wav), SamplingParams(logprobs=2), None),
    ],
)
def test_what_a_stage_that_draws_no_tokens_does_not_read(edge: Any, given: SamplingParams, name: str | None) -> None:
    """Lists for all stages are made by people who fill in each: what changes nothing may stand there."""
    read = read_of(edge)
    if name is None:
        assert params_for(DEFAULTS, [DEFAULTS[0], TALKER, given], text=TEXT, read=read)[2] is given
        return
    with pytest.raises(RequestError, match=f"stage 2: {name}=.*draws no tokens") as caught:
        params_for(DEFAULTS, [DEFAULTS[0], TALKER, given], text=TEXT, read=read)
    details = caught.value.details
    assert (details["field"], details["stage_id"], details["parameter"]) == ("sampling_params_list.2", 2, name)
    with pytest.raises(RequestError, match=f"stage 2: {name}="):
        params_for({2: DEFAULTS[2]}, given, read=read)
    assert params_for(DEFAULTS, given, read=read)[2] is DEFAULTS[2], "one set is for the stages that draw"
    assert params_for({**DEFAULTS, 2: given}, [DEFAULTS[0], TALKER, given], read=read)[2] is given


def test_defaults_that_a_stage_does_not_read() -> None:
    stage = replace(PIPELINE.stages[2], default_sampling_params={"repetition_penalty": 1.1})
    pipeline = replace(PIPELINE, stages=(*PIPELINE.stages[:2], stage))
    message = "stage 2: default_sampling_params: sampling params of stage 2: repetition_penalty=1.1: .* it reads none"
    with pytest.raises(ConfigError, match=message):
        default_params(pipeline, read_of(talker2code2wav))


def test_loose_arguments_need_a_diffusion_stage() -> None:
    for name, hint in (("height", "stage$"), ("hight", "did you mean 'height'")):
        with pytest.raises(RequestError, match=hint):
            params_for(DEFAULTS, None, {name: 64})


def test_options_go_to_the_stage_that_reads_the_prompt() -> None:
    options, loose = entry_options("hi", ADAPTER, 3, None, True)
    assert (options, loose) == ({"lora_request": ADAPTER, "priority": 3}, {})
    request = OmniRequest("r", "hi", {}, options=options)
    assert request.entry == {"prompt": "hi", "lora_request": ADAPTER, "priority": 3}
    assert request.prompt == "hi"
    request = OmniRequest("r", {"prompt_token_ids": [1]}, {}, options={"priority": 1})
    assert request.entry == {"prompt_token_ids": [1], "priority": 1}
    assert entry_options({"prompt": "hi", "lora_request": ADAPTER}, None, 0, None, True) == ({}, {})
    assert entry_options("a cup", ADAPTER, 0, {"height": 64}, False) == ({}, {"height": 64, "lora_request": ADAPTER})


@pytest.mark.parametrize(
    ("prompt", "adapter", "priority", "on_vllm", "words"),
    [
        ({"prompt": "hi", "lora_request": ADAPTER}, ADAPTER, 0, True, "lora_request given twice"),
        ({"prompt": "hi", "priority": 1}, None, 2, True, "priority given twice"),
        ({"prompt": "hi", "lora_request": ADAPTER}, None, 0, False, "as a sampling parameter"),
        ("hi", None, 2, False, "as they come"),
    ],
)
def test_options_that_nobody_takes(prompt: Any, adapter: Any, priority: int, on_vllm: bool, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        entry_options(prompt, adapter, priority, None, on_vllm)


def test_one_for_all_or_one_each() -> None:
    assert each(ADAPTER, 2, "lora_request") == [ADAPTER, ADAPTER]
    assert each([ADAPTER, None], 2, "lora_request") == [ADAPTER, None]
    with pytest.raises(RequestError, match="1 of priority for 2 prompts"):
        each([1], 2, "priority")


def test_voices() -> None:
    talker = SimpleNamespace(speaker_id={"chelsie": 1, "ethan": 2})
    voices = voices_of(SimpleNamespace(model_type="qwen3_omni_moe", talker_config=talker), "somewhere")
    assert voices == ("chelsie", "ethan")
    assert voices_of(SimpleNamespace(model_type="llama"), "somewhere") == ()
    for fine in ("hi", {"prompt": "hi"}, {"additional_information": {"speaker": "Ethan"}}):
        check_speaker(fine, voices)
    check_speaker({"additional_information": {"speaker": "anybody"}}, ())
    for wrong in ("nobody", 3):
        with pytest.raises(RequestError, match="the voices are chelsie, ethan") as caught:
            check_speaker({"additional_information": {"speaker": wrong}}, voices)
        assert caught.value.details["field"] == "speaker"
        assert caught.value.details["allowed"] == ["chelsie", "ethan"]


def silent(edge: EdgeInput) -> Any:
    """A user's edge function that says nothing of what it reads."""
    return edge.prompt["additional_information"]["tempo"]


def declared(*keys: str) -> StageNode:
    return StageNode(1, sources=(0,), process_input=reads(*keys)(silent))


@pytest.mark.parametrize(
    ("root", "nodes", "keys"),
    [
        ({"information": []}, [declared("speaker"), declared("speaker", "tempo")], {"speaker", "tempo"}),
        ({"information": ["mood"]}, [declared("tempo")], {"mood", "tempo"}),
        ({"information": []}, [StageNode(1, sources=(0,), process_input=pass_on)], set()),
        ({"information": []}, [declared("speaker"), StageNode(1, sources=(0,), process_input=silent)], None),
        ({"information": None}, [declared("speaker")], None),
        ({}, [], None),
    ],
)
def test_who_reads_what_comes_with_a_prompt(root: Any, nodes: list[StageNode], keys: set[str] | None) -> None:
    infos = {0: StageInfo("root", facts=root), 1: StageInfo("talker", facts={"information": []})}
    assert information_keys([StageNode(0), *nodes], infos) == keys


def test_information_that_nobody_reads_is_refused() -> None:
    for prompt in ("hi", {"prompt": "hi"}, {"additional_information": None}, {"additional_information": {"tempo": 2}}):
        check_information(prompt, {"speaker", "tempo"})
    check_information({"additional_information": {"anything": 1}}, None)
    with pytest.raises(RequestError, match="unknown key 'speeker'; did you mean 'speaker'") as caught:
        check_information({"additional_information": {"speaker": "Ethan", "speeker": "Ethan"}}, {"speaker", "tempo"})
    assert caught.value.details["field"] == "speeker"
    assert caught.value.details["allowed"] == ["speaker", "tempo"]
    with pytest.raises(RequestError, match="the model reads none"):
        check_information({"additional_information": {"speaker": "Ethan"}}, ())


@pytest.mark.parametrize("kind", [RequestError, IndexError])
def test_an_error_holds_nothing_of_its_request(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    """Tensors between stages are free again while somebody still looks at the error."""

    class Tensor:
        pass

    class Flow:
        key = "flow"
        sink = SimpleNamespace(on_end=lambda error: errors.append(error))

    def look(tensor: Tensor) -> None:
        raise ValueError("damaged")

    def refuse(tensor: Tensor) -> None:
        try:
            look(tensor)
        except ValueError as error:
            raise kind("no") from error

    errors: list[Exception] = []
    orchestrator = Orchestrator(StageGraph([StageNode(0)]), {})
    monkeypatch.setattr(orchestrator, "_forget", lambda flow, error: orchestrator._flows.clear())
    tensor, flow = Tensor(), Flow()
    orchestrator._flows[flow.key] = flow  # type: ignore[assignment]
    held = weakref.ref(tensor), weakref.ref(flow)
    orchestrator._guarded(flow, 0, refuse, tensor)  # type: ignore[arg-type]
    del tensor, flow
    assert [ref() for ref in held] == [None, None]
    assert errors[0].details["stage_id"] == 0
