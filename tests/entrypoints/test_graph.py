"""Requests on graphs of stages: chains, fan-out, merge, skip, several outputs, streams of chunks."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.entrypoints.graphs import HERE, ask, chain, stage, trace, until, write
from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.errors import RequestError, StageError
from vllm_omni.outputs import OmniRequestOutput

Start = Callable[..., AsyncOmni]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start an engine on a list of stages; ended after the test."""
    engines = []

    def make(stages: list[dict[str, Any]], top: dict[str, Any] | None = None, **kwargs: Any) -> AsyncOmni:
        engines.append(AsyncOmni(stage_configs_path=write(tmp_path, stages, **(top or {})), **kwargs))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


async def collect(engine: AsyncOmni, prompt: Any, **kwargs: Any) -> list[OmniRequestOutput]:
    return [output async for output in engine.generate(prompt, **kwargs)]


async def test_a_chain_runs_every_stage_in_order(start: Start) -> None:
    engine = start(chain(3))
    (output,) = await collect(engine, ask("tea"), request_id="mine")
    assert trace(output) == [0, 1, 2]
    assert (output.request_id, output.stage_id, output.finished, output.final_output_type) == ("mine", 2, True, "text")
    assert output.multimodal_output["prompt"] == "tea"
    stages = output.metrics["stages"]
    assert 0 <= stages["0"]["start_s"] < stages["1"]["start_s"] < stages["2"]["start_s"]
    for times in stages.values():
        sizes = [times.pop(name) for name in ("bytes_in", "bytes_out")]
        assert all(len("tea") < size < 1000 for size in sizes)
        assert times["transfer_s"] == pytest.approx(times.pop("transfer_in_s") + times.pop("transfer_out_s"))
        assert set(times) == {"start_s", "wait_s", "transfer_s", "queue_s", "run_s"}
        assert all(0 <= seconds < 5 for seconds in times.values())
    assert sorted(stages) == ["0", "1", "2"]


async def test_two_hundred_requests_at_once(start: Start) -> None:
    engine = start(chain(3))
    results = await asyncio.gather(*(collect(engine, ask(f"p{i}")) for i in range(200)))
    assert [outputs[0].multimodal_output["prompt"] for outputs in results] == [f"p{i}" for i in range(200)]
    assert engine.orchestrator.open_requests == 0


async def test_fan_out_and_two_final_outputs(start: Start) -> None:
    engine = start([stage(0, None, "text"), stage(1, [0], "audio"), stage(2, [0], "image")])
    outputs = await collect(engine, ask())
    assert sorted((o.final_output_type, tuple(trace(o))) for o in outputs) == [
        ("audio", (0, 1)),
        ("image", (0, 2)),
        ("text", (0,)),
    ]
    assert outputs[0].final_output_type == "text", "the first stage's output does not wait for the others"


async def test_a_merge_gets_all_its_sources_at_once(start: Start) -> None:
    engine = start(
        [
            stage(0),
            stage(1, [0], custom_process_input_func=f"{HERE}.upper"),
            stage(2, [0]),
            stage(3, [1, 2], "text", custom_process_input_func=f"{HERE}.merge"),
        ]
    )
    (output,) = await collect(engine, ask("a"))
    assert output.multimodal_output["prompt"] == "A+a"
    assert output.multimodal_output["additional_information"]["traces"] == {1: [[0, 1]], 2: [[0, 2]]}


async def test_stages_that_the_wanted_outputs_do_not_need_are_not_run(start: Start) -> None:
    engine = start([stage(0, None, "text"), stage(1, [0]), stage(2, [1], "audio")])
    (text,) = await collect(engine, ask(), output_modalities=["text"])
    assert text.final_output_type == "text"
    (audio,) = await collect(engine, ask(), output_modalities=["audio"])
    assert (audio.final_output_type, trace(audio)) == ("audio", [0, 1, 2])
    assert len(await collect(engine, ask())) == 2
    batches = await engine.collective_rpc("state")
    assert [sum(state["batches"]) for state in batches] == [3, 2, 2]
    with pytest.raises(RequestError, match="no stage makes 'video'; the model makes audio, text"):
        await collect(engine, ask(), output_modalities=["video"])


async def test_an_edge_may_find_a_stage_unneeded(start: Start) -> None:
    engine = start(
        [stage(0, None, "text"), stage(1, [0], custom_process_input_func=f"{HERE}.not_needed"), stage(2, [1], "audio")]
    )
    outputs = await collect(engine, ask())
    assert [output.final_output_type for output in outputs] == ["text"]
    assert engine.orchestrator.open_requests == 0


async def test_chunks_stream_in_order_through_three_stages(start: Start) -> None:
    engine = start(chain(3), {"async_chunk": True})
    outputs = await collect(engine, ask("s", chunks=20))
    assert [o.multimodal_output["additional_information"]["number"] for o in outputs] == list(range(20))
    assert [o.finished for o in outputs] == [False] * 19 + [True]
    assert all(trace(o) == [0, 1, 2] for o in outputs)


async def test_every_chunk_has_its_request_s_parameters(start: Start) -> None:
    """They travel to a stage once, with the request's first chunk."""
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params

    engine = start(chain(2, engine={"report": True}), {"async_chunk": True})
    asked = [
        collect(engine, ask("s", chunks=3), sampling_params=[Params(seed=seed), Params(seed=seed + 1)])
        for seed in (10, 20)
    ]
    for outputs, seed in zip(await asyncio.gather(*asked), (11, 21), strict=True):
        seen = [output.multimodal_output["seen"] for output in outputs]
        assert [(one["chunk"], one["params"].seed) for one in seen] == [(0, seed), (1, seed), (2, seed)]


async def test_streams_of_many_requests_do_not_mix(start: Start) -> None:
    engine = start(chain(2), {"async_chunk": 1})
    results = await asyncio.gather(*(collect(engine, ask(f"r{i}", chunks=5)) for i in range(20)))
    for i, outputs in enumerate(results):
        assert [o.multimodal_output["prompt"] for o in outputs] == [f"r{i}"] * 5
        assert [o.multimodal_output["additional_information"]["number"] for o in outputs] == list(range(5))


async def test_without_streaming_the_edge_gets_everything_in_one_call(start: Start) -> None:
    stages = [stage(0), stage(1, [0], "text", custom_process_input_func=f"{HERE}.merge")]
    (output,) = await collect(start(stages), ask("x", chunks=3))
    assert output.multimodal_output["prompt"] == "x+x+x"


async def test_window_size_of_an_edge_wins_over_async_chunk(start: Start) -> None:
    stages = [stage(0, None, "text"), stage(1, [0], "audio", custom_process_input_func=f"{HERE}.merge")]
    top = {"async_chunk": 1, "runtime": {"edges": [{"from": 0, "to": 1, "window_size": 2}]}}
    outputs = await collect(start(stages, top), ask("x", chunks=5))
    by_type = Counter(output.final_output_type for output in outputs)
    assert by_type == {"text": 5, "audio": 3}
    audio = [o.multimodal_output["prompt"] for o in outputs if o.final_output_type == "audio"]
    assert audio == ["x+x", "x+x", "x"]


async def test_an_edge_function_may_hold_chunks_back(start: Start) -> None:
    stages = [stage(0), stage(1, [0], "text", custom_process_input_func=f"{HERE}.numbered")]
    outputs = await collect(start(stages, {"async_chunk": 1}), ask("x", chunks=5))
    assert [o.multimodal_output["prompt"] for o in outputs] == ["0,1", "2,3", "4"]


async def test_an_edge_that_raises_fails_its_request_alone(start: Start) -> None:
    engine = start([stage(0, None, "text"), stage(1, [0], "audio", custom_process_input_func=f"{HERE}.raises")])
    with pytest.raises(StageError, match="input function of stage 1 raised KeyError: 'no such thing'") as caught:
        await collect(engine, ask())
    assert caught.value.details["stage_id"] == 1
    assert "in raises" in caught.value.details["cause"]
    (output,) = await collect(engine, ask(), output_modalities=["text"])
    assert output.final_output_type == "text"


async def test_an_edge_that_returns_what_cannot_travel(start: Start) -> None:
    engine = start([stage(0), stage(1, [0], "text", custom_process_input_func=f"{HERE}.thread_inside")])
    with pytest.raises(RequestError, match=r"additional_information\.lock: a _thread\.lock cannot travel"):
        await collect(engine, ask())
    assert engine.orchestrator.open_requests == 0


async def test_max_inflight_holds_requests_back_in_the_driver(start: Start) -> None:
    engine = start(chain(1), {"runtime": {"defaults": {"max_inflight": 2}}})
    hanging = [asyncio.create_task(collect(engine, ask(hang=0), request_id=f"h{i}")) for i in range(2)]
    await until(lambda: engine.orchestrator.open_requests == 2)
    waiting = asyncio.create_task(collect(engine, ask("w")))
    await until(lambda: engine.orchestrator.open_requests == 3)
    hung: list[str] = []
    while len(hung) < 2:
        (state,) = await engine.collective_rpc("state")
        hung = state["hanging"]
    assert state["queue"] == 0
    assert sum(state["batches"]) == 2, "the third has not been sent"
    assert not waiting.done()
    await engine.abort("h0")
    (output,) = await waiting
    assert output.metrics["stages"]["0"]["wait_s"] > 0
    await engine.abort("h1")
    assert all(isinstance(result, Exception) for result in await asyncio.gather(*hanging, return_exceptions=True))


async def test_sampling_parameters_reach_their_stages(start: Start) -> None:
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params

    stages = chain(2, engine={"report": True})
    stages[0]["final_output"] = True
    stages[1]["default_sampling_params"] = {"seed": 7}
    engine = start(stages)

    async def seeds(*args: Any, **kwargs: Any) -> list[int | None]:
        outputs = [output async for output in engine.generate(ask(), *args, **kwargs)]
        return [o.multimodal_output["seen"]["params"].seed for o in sorted(outputs, key=lambda o: o.stage_id or 0)]

    assert await seeds() == [None, 7]
    assert await seeds(Params(seed=1)) == [1, 1]
    assert await seeds("id", Params(seed=1)) == [1, 1]
    assert await seeds([Params(seed=1), Params(seed=2)], "id") == [1, 2]
    assert await seeds(sampling_params=Params(seed=4), request_id="id") == [4, 4]
    with pytest.raises(ValueError, match="Expected 2 sampling params, got 3"):
        await seeds([Params()] * 3)
    with pytest.raises(ValueError, match="given twice"):
        await seeds(Params(), sampling_params=Params())
    with pytest.raises(RequestError, match="height=3: allowed is 16 to 16384"):
        await seeds(Params(height=3))
