"""Streams that go straight from the process of a stage to the next one's, past the driver."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.entrypoints.graphs import HERE, ask, chain, stage, trace, until, write
from vllm_omni.config.stage import load_stage_configs
from vllm_omni.engine.stage_seam import StageOutput
from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.entrypoints.orchestrator import Orchestrator
from vllm_omni.entrypoints.stage_client import ProcessStageClient
from vllm_omni.entrypoints.stage_graph import direct_edges
from vllm_omni.errors import RequestAborted, RequestError, StageDeadError, StageError
from vllm_omni.outputs import OmniRequestOutput

Start = Callable[..., AsyncOmni]
STREAM: dict[str, Any] = {"async_chunk": True}


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start an engine on a list of stages, streaming; ended after the test."""
    engines = []

    def make(stages: list[dict[str, Any]], **top: Any) -> AsyncOmni:
        engines.append(AsyncOmni(stage_configs_path=write(tmp_path, stages, **{**STREAM, **top})))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How many outputs of each stage the driver hears of."""
    counts: Counter[int] = Counter()
    inner = Orchestrator.on_output

    def on_output(self: Orchestrator, stage_id: int, output: StageOutput) -> None:
        counts[stage_id] += 1
        inner(self, stage_id, output)

    monkeypatch.setattr(Orchestrator, "on_output", on_output)
    return counts


async def collect(engine: AsyncOmni, prompt: Any, **kwargs: Any) -> list[OmniRequestOutput]:
    return [output async for output in engine.generate(prompt, **kwargs)]


def numbers(outputs: list[OmniRequestOutput]) -> list[int]:
    return [output.multimodal_output["additional_information"]["number"] for output in outputs]


def texts(outputs: list[OmniRequestOutput]) -> list[str]:
    return [output.multimodal_output["prompt"] for output in outputs]


@pytest.mark.parametrize(
    ("stages", "top", "edges"),
    [
        (chain(3), STREAM, {1: 0, 2: 1}),
        (chain(3), {}, {}),
        (chain(3), {"runtime": {"edges": [{"from": 1, "to": 2, "window_size": 3}]}}, {2: 1}),
        (chain(2), {**STREAM, "runtime": {"defaults": {"max_inflight": 4}}}, {}),
        ([stage(0, None, "text"), stage(1, [0], "audio")], STREAM, {}),
        ([stage(0), stage(1, [0], "text"), stage(2, [0], "audio")], STREAM, {}),
        (
            [stage(0), stage(1), stage(2, [0, 1], custom_process_input_func=f"{HERE}.merge"), stage(3, [2], "text")],
            STREAM,
            {3: 2},
        ),
    ],
    ids=["chain", "not streamed", "one window", "held back", "source is final", "two readers", "merge"],
)
def test_which_edges_are_direct(
    tmp_path: Path, stages: list[dict[str, Any]], top: dict[str, Any], edges: dict[int, int]
) -> None:
    found = direct_edges(load_stage_configs(write(tmp_path, stages, **top)))
    assert {target: edge.source for target, edge in found.items()} == edges


def test_edges_of_vllms_stages_are_not(tmp_path: Path) -> None:
    vllm: dict[str, Any] = {
        "stage_id": 1,
        "stage_type": "llm",
        "engine_args": {"model": "m"},
        "engine_input_source": [0],
    }
    last = stage(2, [1], "text", custom_process_input_func=f"{HERE}.upper")
    vllm["custom_process_input_func"] = f"{HERE}.upper"
    path = write(tmp_path, [stage(0), vllm, last], **STREAM)
    assert direct_edges(load_stage_configs(path)) == {}


async def test_chunks_go_past_the_driver(start: Start, heard: Counter[int]) -> None:
    engine = start(chain(3, engine={"progress": True}))
    steps: list[int] = []
    outputs = await collect(engine, ask("s", chunks=20), on_progress=lambda stage_id, *_: steps.append(stage_id))
    assert numbers(outputs) == list(range(20))
    assert [output.finished for output in outputs] == [False] * 19 + [True]
    assert all(trace(output) == [0, 1, 2] for output in outputs)
    assert heard == {0: 1, 1: 1, 2: 20}, "of the others the driver hears once, at their end"
    assert Counter(steps) == {0: 60, 1: 60, 2: 60}
    stages = outputs[-1].metrics["stages"]
    assert 0 <= stages["0"]["start_s"] < stages["1"]["start_s"] < stages["2"]["start_s"]
    for times in stages.values():
        assert all(0 <= times[name] < 5 for name in ("wait_s", "transfer_in_s", "transfer_out_s", "queue_s", "run_s"))
    assert stages["0"]["bytes_in"] < 200 < 20 * 50 < stages["0"]["bytes_out"]
    assert 0 < stages["0"]["bytes_out"] - stages["1"]["bytes_in"] < 20 * 200, "but for the heads of the messages"
    many = await asyncio.gather(*(collect(engine, ask(f"r{i}", chunks=5)) for i in range(30)))
    assert [texts(each) for each in many] == [[f"r{i}"] * 5 for i in range(30)]
    assert all(numbers(each) == list(range(5)) for each in many)
    assert engine.orchestrator.open_requests == 0
    assert [load.inside for load in engine.orchestrator.loads.values()] == [0, 0, 0]


async def test_large_leaves_go_through_shared_memory(start: Start) -> None:
    stages = chain(3)
    stages[1]["custom_process_input_func"] = f"{HERE}.upper"
    blob = bytes(range(256)) * 1000
    outputs = await collect(start(stages), ask("x", chunks=4, blob=blob))
    infos = [output.multimodal_output["additional_information"] for output in outputs]
    assert [bytes(info["blob"]) == blob for info in infos] == [True] * 4
    assert texts(outputs) == ["X"] * 4
    assert outputs[-1].metrics["stages"]["1"]["bytes_in"] > 4 * len(blob)


async def test_edge_functions_are_called_by_the_stage(start: Start, heard: Counter[int]) -> None:
    stages = chain(4)
    for target, name in ((1, "numbered"), (2, "merge"), (3, "upper")):
        stages[target]["custom_process_input_func"] = f"{HERE}.{name}"
    engine = start(stages, runtime={"edges": [{"from": 1, "to": 2, "window_size": 2}]})
    outputs = await collect(engine, ask("x", chunks=7, odd="y"))
    assert texts(outputs) == ["0,1+2,3", "4,5+6"]
    assert [o.multimodal_output["additional_information"]["odd"] for o in outputs] == ["y", "y"], "the user's prompt"
    assert heard[0] == heard[1] == heard[2] == 1


async def test_an_edge_that_raises_and_one_that_needs_nothing(start: Start) -> None:
    stages = chain(3)
    stages[1]["custom_process_input_func"] = f"{HERE}.raises"
    engine = start(stages)
    with pytest.raises(StageError, match="input function of stage 1 raised KeyError: 'no such thing'") as caught:
        await collect(engine, ask(chunks=1000))
    assert caught.value.details["stage_id"] == 1
    assert "in raises" in caught.value.details["cause"]
    stages[1]["custom_process_input_func"] = f"{HERE}.not_needed"
    other = start(stages)
    assert await collect(other, ask(chunks=3)) == []
    for each in (engine, other):
        assert each.orchestrator.open_requests == 0
        assert [load.inside for load in each.orchestrator.loads.values()] == [0, 0, 0]


async def test_requests_that_end_in_the_middle(start: Start) -> None:
    engine = start(chain(3))
    stream = engine.generate(ask(chunks=100_000))
    for _ in range(3):
        await anext(stream)
    await stream.aclose()
    for where in (1, 2):
        with pytest.raises(RequestError, match="told to fail"):
            await collect(engine, ask(chunks=100_000, fail=where))
        task = asyncio.create_task(collect(engine, ask(chunks=100_000, hang=where), request_id="mine"))
        while not (await engine.collective_rpc("state"))[where]["hanging"]:
            await asyncio.sleep(0)
        await engine.abort("mine")
        with pytest.raises(RequestAborted):
            await task
    assert engine.orchestrator.open_requests == 0
    assert numbers(await collect(engine, ask(chunks=5))) == list(range(5))
    states = await engine.collective_rpc("state")
    assert [(state["queue"], state["hanging"]) for state in states] == [(0, [])] * 3
    assert [len(state["aborted"]) for state in states] == [5, 4, 4], "the stage that failed a request knows"
    with pytest.raises(RequestError, match="cannot travel"):
        await collect(engine, ask(lock=object()))
    assert len(await collect(engine, ask())) == 1


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_a_killed_stage_fails_its_streams(start: Start, victim: int) -> None:
    engine = start(chain(3))
    streams = [asyncio.create_task(collect(engine, ask(chunks=100_000))) for _ in range(3)]
    await until(lambda: engine.orchestrator.open_requests == 3)
    await collect(engine, ask())
    psutil.Process(engine.stage_infos[victim].facts["pid"]).kill()
    async with asyncio.timeout(2):
        results = await asyncio.gather(*streams, return_exceptions=True)
    assert all(isinstance(result, StageDeadError) for result in results)
    assert {result.details["stage_id"] for result in results} == {victim}  # type: ignore[union-attr]
    others = [info.facts["pid"] for stage_id, info in engine.stage_infos.items() if stage_id != victim]
    assert all(psutil.Process(other).status() != psutil.STATUS_ZOMBIE for other in others), "the others go on"


async def test_a_stage_that_cannot_be_told_is_fed_by_the_driver(
    start: Start, heard: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = ProcessStageClient.expect

    def expect(self: ProcessStageClient, *args: Any) -> bool:
        return inner(self, *args) and self.stage_id != 1

    monkeypatch.setattr(ProcessStageClient, "expect", expect)
    engine = start(chain(4))
    outputs = await collect(engine, ask(chunks=10))
    assert numbers(outputs) == list(range(10))
    assert all(trace(output) == [0, 1, 2, 3] for output in outputs)
    assert heard == {0: 10, 1: 1, 2: 1, 3: 10}
    assert [load.inside for load in engine.orchestrator.loads.values()] == [0, 0, 0, 0]
