"""Traces: files that Perfetto reads, complete and in order across processes, and spans for a collector."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.entrypoints.collector import Collector
from tests.entrypoints.graphs import ask, chain, stage, write
from tests.entrypoints.openai.server import ROOT, Server, picture_stages
from vllm_omni.entrypoints import tracing
from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.entrypoints.omni_args import DEFAULT_MODEL
from vllm_omni.errors import ConfigError, DeadlineError

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
            if len(spans.get("omni_request", [])) == 2:
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
        failed = [span for span in collector.spans if span.name == "omni_request" and span.status.code == 2]
        assert len(failed) == 1
        assert "told to fail" in failed[0].status.message
    finally:
        server.process.kill()
        server.process.wait(10)
        server.http.close()
    assert len(requests(load_cut(path))) == 3
