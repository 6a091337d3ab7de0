"""Traces: files that Perfetto reads, complete and in order across processes, and spans for a collector."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.entrypoints.collector import Collector
from tests.entrypoints.graphs import HERE, ask, chain, stage, write
from tests.entrypoints.openai.server import ROOT, Server, picture_stages
from vllm_omni.entrypoints import tracing
from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.entrypoints.omni_args import DEFAULT_MODEL
from vllm_omni.errors import ConfigError, DeadlineError, RequestError

Event = dict[str, Any]


def load(path: Path) -> list[Event]:
    """The events of a finished file."""
    events: list[Event] = json.loads(path.read_text())
    return events


def load_cut(path: Path) -> list[Event]:
    """The events of a file whose writer was killed: readers of the format add the bracket."""
    events: list[Event] = json.loads(path.read_text() + "]")
    return events


def requests(events: list[Event]) -> list[Event]:
    return [event for event in events if event["name"] == "request"]


def of(events: list[Event], request: Event) -> list[Event]:
    """Slices of one request; transfers as slices, too."""
    mine = [dict(event) for event in events if event["tid"] == request["tid"] and event["ph"] in "Xbe"]
    ends = {event["id"]: event["ts"] for event in mine if event["ph"] == "e"}
    for event in mine:
        if event["ph"] == "b":
            event["dur"] = ends[event["id"]] - event["ts"]
    return [event for event in mine if event["ph"] in "Xb"]


def check_nesting(events: list[Event]) -> None:
    """On each track, of two slices one holds the other or ends before it begins."""
    tracks: dict[tuple[int, int], list[tuple[float, float, str]]] = {}
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0, event
            slice_ = (event["ts"], event["ts"] + event["dur"], event["name"])
            tracks.setdefault((event["pid"], event["tid"]), []).append(slice_)
    for slices in tracks.values():
        open_: list[tuple[float, float, str]] = []
        for begin, end, name in sorted(slices, key=lambda item: (item[0], -item[1])):
            while open_ and open_[-1][1] <= begin + 0.01:
                open_.pop()
            assert not open_ or end <= open_[-1][1] + 0.01, (name, open_[-1])
            open_.append((begin, end, name))


def coverage(events: list[Event], request: Event) -> float:
    """Share of the request's time for which some part of the trace says what was done."""
    parts = sorted((e["ts"], e["ts"] + e["dur"]) for e in of(events, request) if e["name"] != "request")
    begin, end = request["ts"], request["ts"] + request["dur"]
    covered, at = 0.0, begin
    for start, stop in parts:
        start, stop = max(start, at), min(stop, end)
        if stop > start:
            covered, at = covered + stop - start, stop
    return covered / (end - begin)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """The trace of a picture alone and of two at once."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    with Omni(str(DEFAULT_MODEL), trace=str(path)) as omni:
        for count in (1, 2):
            omni.generate(["a red circle"] * count, use_tqdm=False, num_inference_steps=4, seed=1)
        assert len(requests(load_cut(path))) == 3, "written as the requests end"
    return load(path)


def test_a_picture(pictures: list[Event]) -> None:
    """Everything that was done for it stands there, in order, without gaps."""
    check_nesting(pictures)
    assert len(requests(pictures)) == 3
    for request in requests(pictures):
        parts = of(pictures, request)
        names = [event["name"] for event in sorted(parts, key=lambda event: (event["ts"], -event["dur"]))]
        names = [name for name in names if name != "wait for stage 0"]
        assert names == ["request", "to stage", "queue", "run", "encode", *["denoise"] * 4, "decode", "from stage"]
        assert [e["args"]["step"] for e in parts if e["name"] == "denoise"] == [1, 2, 3, 4]
        assert coverage(pictures, request) >= 0.95
        steps = sum(e["dur"] for e in parts if e["name"] in ("encode", "denoise", "decode"))
        (run,) = (e for e in parts if e["name"] == "run")
        assert 0.9 * run["dur"] < steps <= run["dur"] * 1.001
        sizes = {e["name"]: e["args"]["bytes"] for e in parts if e["name"].endswith("stage")}
        assert sizes["from stage"] > 128 * 128 * 3
        assert 20 < sizes["to stage"] < 2000
    alone, *both = (next(e for e in of(pictures, r) if e["name"] == "denoise") for r in requests(pictures))
    assert [alone["args"]["batch"], *(e["args"]["batch"] for e in both)] == [1, 2, 2]
    assert both[0]["ts"] == both[1]["ts"], "one step of the stage, seen by both requests"


def test_names(pictures: list[Event]) -> None:
    """Each process of the model is one of the trace; a track bears the request's name."""
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in pictures if e["ph"] == "M"}
    assert named[(1, 0)] == "stage 0 (QwenImagePipeline)"
    assert named[(0, 0)].startswith("driver")
    for request in requests(pictures):
        assert named[(0, request["tid"])] == named[(1, request["tid"])] == request["args"]["request_id"]


async def run(engine: AsyncOmni, prompt: Any, name: str, **kwargs: Any) -> None:
    async for _ in engine.generate(prompt, name, **kwargs):
        pass


async def test_a_chain_with_chunks(tmp_path: Path) -> None:
    """Three processes, twenty chunks: each stage after the one before it, transfers between them with their bytes."""
    path = tmp_path / "trace.json"
    stages = write(tmp_path, chain(3), async_chunk=True)
    engine = AsyncOmni(stage_configs_path=stages, trace=str(path), shm_threshold_bytes=1000)
    try:
        await asyncio.gather(*(run(engine, ask("x" * 5000, chunks=20, pace=0.002), f"r{i}") for i in range(3)))
        await run(engine, ask(chunks=2), "last")
        with pytest.raises(DeadlineError):
            await run(engine, ask(hang=1), "late", timeout=0.2)
    finally:
        engine.shutdown()
    events = load(path)
    check_nesting(events)
    by_name = {request["args"]["request_id"]: request for request in requests(events)}
    assert set(by_name) == {"r0", "r1", "r2", "last", "late"}
    for number in range(3):
        request = by_name[f"r{number}"]
        assert coverage(events, request) >= 0.95
        for before, after in ((1, 2), (2, 3)):
            starts = [
                next(e for e in of(events, request) if e["pid"] == pid and e["name"] == "run")["ts"]
                for pid in (before, after)
            ]
            assert starts[0] < starts[1]
        for pid in (1, 2, 3):
            out = [e for e in of(events, request) if e["pid"] == pid and e["name"] == "from stage"]
            assert [e["args"]["chunk"] for e in out] == list(range(20))
            assert all(e["args"]["bytes"] >= 5000 for e in out)
    late = by_name["late"]
    assert "DeadlineError" in late["args"]["error"]
    assert [e["name"] for e in of(events, late) if e["pid"] == 2] == ["unfinished"]


async def streams(folder: Path, **top: Any) -> list[Event]:
    """The trace of streams through four stages, whose edges hand over one, two or every second chunk: one that is
    whole, one that ends in a stage that hangs, and one that a stage in the middle fails."""
    stages = chain(4)
    for target, name in ((1, "numbered"), (2, "merge"), (3, "upper")):
        stages[target]["custom_process_input_func"] = f"{HERE}.{name}"
    edges = [{"from": 1, "to": 2, "window_size": 2}]
    runtime = {"edges": edges, **top}
    path = folder / "trace.json"
    config = write(folder, stages, async_chunk=True, runtime=runtime)
    engine = AsyncOmni(stage_configs_path=config, trace=str(path))
    try:
        await run(engine, ask("x" * 500, chunks=7), "whole")
        with pytest.raises(DeadlineError):
            await run(engine, ask(chunks=2, hang=2), "hangs", timeout=0.3)
        with pytest.raises(RequestError, match="told to fail"):
            await run(engine, ask(chunks=2, fail=2), "fails")
    finally:
        engine.shutdown()
    return load(path)


async def test_a_stream_past_the_driver_is_traced_as_by_it(tmp_path: Path) -> None:
    """The same parts, as often; what is straight is how the chunks went."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight, driven = await streams(tmp_path / "a"), await streams(tmp_path / "b", defaults={"max_inflight": 9})
    check_nesting(straight)
    for ours, theirs in zip(requests(straight), requests(driven), strict=True):
        name = ours["args"]["request_id"]
        assert name == theirs["args"]["request_id"]
        # A failure may come to the driver before the notes of the stages ahead of it.
        first = 3 if name == "fails" else 1
        parts, expected = (
            Counter((event["pid"], event["name"]) for event in of(events, request) if event["pid"] >= first)
            for events, request in ((straight, ours), (driven, theirs))
        )
        assert parts == expected, name
    whole = of(straight, requests(straight)[0])
    assert Counter(event["name"] for event in whole if event["pid"] == 2) == {
        **{"to stage": 4, "queue": 1, "run": 1, "answer": 4, "from stage": 4}
    }
    by_stage = {
        (pid, name): sorted(
            (event for event in whole if (event["pid"], event["name"]) == (pid, name)),
            key=lambda event: int(event["args"]["chunk"]),
        )
        for pid in (1, 2, 3, 4)
        for name in ("from stage", "to stage")
    }
    for source in (1, 2, 3):
        left, came = by_stage[source, "from stage"], by_stage[source + 1, "to stage"]
        assert {event["args"]["to"] for event in left} == {source}
        assert {event["args"]["from"] for event in came} == {source - 1}
        ways = [(event["ts"], event["dur"]) for event in left]
        assert all(dur > 0 for _, dur in ways)
        assert {(event["ts"], event["dur"]) for event in came} <= set(ways), "one way, seen from both of its ends"
        sizes = [sum(event["args"]["bytes"] for event in events) for events in (left, came)]
        assert 0 <= sizes[0] - sizes[1] < 150 * len(left), "but for the heads of the messages"
    assert "to" not in by_stage[4, "from stage"][0]["args"]
    assert "from" not in by_stage[1, "to stage"][0]["args"]


async def test_a_stage_that_is_left_out_of_a_stream(tmp_path: Path) -> None:
    """Its source has sent it chunks, of which it needed none."""
    stages = chain(3)
    stages[1]["custom_process_input_func"] = f"{HERE}.not_needed"
    path = tmp_path / "trace.json"
    engine = AsyncOmni(stage_configs_path=write(tmp_path, stages, async_chunk=True), trace=str(path))
    try:
        await run(engine, ask(chunks=3), "r")
    finally:
        engine.shutdown()
    events = load(path)
    parts = of(events, requests(events)[0])
    assert {event["pid"] for event in parts} == {0, 1}
    assert [event["dur"] > 0 for event in parts if event["name"] == "from stage"] == [True] * 3


async def test_spans_of_a_stream_past_the_driver(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage's span begins when its first chunk is sent, and all that is in it comes after."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", collector.grpc_url)  # vLLM sets it; now it goes away again
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    stages = write(tmp_path, chain(2), async_chunk=True)
    engine = AsyncOmni(
        stage_configs_path=stages, otlp_traces_endpoint=collector.grpc_url, collect_detailed_traces=["all"]
    )
    try:
        headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
        await run(engine, ask(chunks=3), "r", trace_headers=headers)
    finally:
        engine.shutdown()
    spans = collector.trace(bytes.fromhex(trace_id))
    counts = {name: len(each) for name, each in spans.items() if not name.startswith(("stage", "omni"))}
    assert {**counts, "wait": 2} == {"to stage": 4, "queue": 2, "run": 2, "answer": 6, "from stage": 6, "wait": 2}
    (target,) = (each[0] for name, each in spans.items() if name.startswith("stage 1"))
    inside = [span for each in spans.values() for span in each if span.parent_span_id == target.span_id]
    assert len(inside) == 8
    assert target.start_time_unix_nano == min(span.start_time_unix_nano for span in inside)
    assert target.end_time_unix_nano >= max(span.end_time_unix_nano for span in inside)


async def test_nothing_is_recorded_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("a trace was begun")

    monkeypatch.setattr(tracing.RequestTrace, "__init__", fail)
    engine = AsyncOmni(stage_configs_path=write(tmp_path, chain(1)))
    try:
        await run(engine, "x", "r")
    finally:
        engine.shutdown()


def test_wrong_settings(tmp_path: Path) -> None:
    stages = write(tmp_path, [stage(0, final="text")])
    with pytest.raises(ConfigError, match=r"trace=.*cannot be written"):
        AsyncOmni(stage_configs_path=stages, trace=str(tmp_path / "no" / "trace.json"))
    with pytest.raises(ConfigError, match="needs otlp_traces_endpoint"):
        AsyncOmni(stage_configs_path=stages, collect_detailed_traces=["all"])
    with pytest.raises(ConfigError, match="allowed are model, worker, all"):
        AsyncOmni(stage_configs_path=stages, otlp_traces_endpoint="x", collect_detailed_traces=["steps"])


def test_without_opentelemetry(tmp_path: Path) -> None:
    """What is missing is said, and how to get it."""
    (tmp_path / "opentelemetry.py").write_text("raise ImportError('not here')")
    code = (
        "from vllm_omni import AsyncOmni\nfrom vllm_omni.errors import ConfigError\n"
        f"try: AsyncOmni(stage_configs_path={write(tmp_path, [stage(0, final='text')])!r}, otlp_traces_endpoint='x')\n"
        "except ConfigError as error: print(error)"
    )
    path = f"{tmp_path}:{ROOT}"
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, env=env)
    assert "pip install 'vllm-omni[otel]'" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def test_spans_of_a_server_and_a_kill(tmp_path: Path, collector: Collector) -> None:
    """A client's trace goes on in the stages; a trace file of a server that is killed can be read."""
    path, trace_id = tmp_path / "trace.json", "4bf92f3577b34da6a3ce929d0e0e4736"
    server = Server(
        *("--stage-configs-path", picture_stages(tmp_path), "--model", "none", "--trace", str(path)),
        *("--otlp-traces-endpoint", collector.grpc_url, "--collect-detailed-traces", "all"),
        **{"OTEL_BSP_SCHEDULE_DELAY": "200"},
    )
    try:
        headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01", "x-request-id": "from-gateway"}
        for stream in (False, True):
            ask_for = {"prompt": "steps", "stream": stream}
            assert server.post("/v1/images/generations", ask_for, headers=headers).status_code == 200
        assert server.post("/v1/images/generations", {"prompt": "fail"}).status_code == 400
        for _ in range(200):
            spans = collector.trace(bytes.fromhex(trace_id))
            failed = [span for span in collector.spans if span.name == "omni_request" and span.status.code == 2]
            if len(spans.get("omni_request", [])) == 2 and failed:
                break
            server.http.get("/health")
            signal.sigtimedwait([], 0.05)
        roots = spans["omni_request"]
        assert [span.parent_span_id.hex() for span in roots] == ["00f067aa0ba902b7"] * 2
        named = [item.value.string_value for item in roots[0].attributes if item.key == "omni.request_id"]
        assert named == ["from-gateway"]
        (name,) = {name for name in spans if name.startswith("stage 0")}
        assert {span.parent_span_id for span in spans[name]} == {span.span_id for span in roots}
        for inner in ("queue", "run", "to stage", "from stage"):
            assert {span.parent_span_id for span in spans[inner]} == {span.span_id for span in spans[name]}
        run_ = spans["run"][0]
        assert roots[0].start_time_unix_nano <= run_.start_time_unix_nano <= run_.end_time_unix_nano
        assert run_.end_time_unix_nano <= roots[0].end_time_unix_nano
        assert len(failed) == 1
        assert "told to fail" in failed[0].status.message
    finally:
        server.process.kill()
        server.process.wait(10)
        server.http.close()
    assert len(requests(load_cut(path))) == 3
