"""``vllm-omni bench serve`` as a command, against real servers."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.entrypoints.openai.server import ROOT, Server
from vllm_omni.benchmarks.http_client import HttpClient
from vllm_omni.benchmarks.load import Load, run_load
from vllm_omni.benchmarks.workload import Call
from vllm_omni.entrypoints.cli.main import run


def bench(server: Server, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_omni", "bench", "serve", "--base-url", server.url, *arguments]
    variables = {**os.environ, "VLLM_API_KEY": server.api_key, "COLUMNS": "100", **env}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)


@pytest.fixture
def with_key(pictures: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", pictures.api_key)


def figures(done: subprocess.CompletedProcess[str], path: Path) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def answers(server: Server, status: int) -> float:
    """Answers of the pictures' endpoint so far."""
    name = f'vllm_omni_http_requests_total{{endpoint="/v1/images/generations",status="{status}"}} '
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def test_closed_loops_with_all_that_is_written(pictures: Server, tmp_path: Path) -> None:
    """The server has counted what the client says that it sent; table, JSON and picture tell the same."""
    before = answers(pictures, 200)
    out, plot = tmp_path / "out.json", tmp_path / "out.svg"
    done = bench(
        pictures, "--concurrency", "1,4", "--num-requests", "20", "--json", str(out), "--plot", str(plot), "--detail",
        "--slo", "e2e=60",
    )  # fmt: skip
    found = figures(done, out)
    assert answers(pictures, 200) - before == 1 + 20 + 4 + 20
    assert found["model"] == "painter"
    assert found["versions"]["vllm-omni"] == found["versions"]["server"]
    assert "sk-secret" not in out.read_text()
    for result, places in zip(found["results"], (1, 4), strict=True):
        assert result["load"] == {"concurrency": places}
        assert (result["requests"], result["succeeded"], result["errors"]) == (20, 20, {})
        assert result["goodput"]["share"] == 1.0
        assert len(result["detail"]) == 20
        stage = result["stages"]["0"]
        assert 0 < stage["run"] + stage["transfer"] + stage["queue"] + stage["wait"] < result["e2e"]["max"]
        assert f"20 of 20 succeeded in {result['wall_s']:.2f} s" in done.stdout
    assert "4 at a time" in done.stdout
    assert done.stderr == ""
    drawing = ElementTree.parse(plot).getroot()
    lines = [node for node in drawing.iter("{http://www.w3.org/2000/svg}path") if node.get("fill") == "none"]
    assert len(lines) == 3 * 2


def test_open_loop_beyond_the_queue(pictures: Server, tmp_path: Path) -> None:
    """What the server refuses is counted by status; asked again, all of it succeeds in the end."""
    out = tmp_path / "out.json"
    load = ("--request-rate", "3000", "--num-requests", "400", "--json", str(out))
    before = answers(pictures, 429)
    result = figures(bench(pictures, *load), out)["results"][0]
    refused = result["errors"]["429"]["count"]
    assert refused == answers(pictures, 429) - before > 0
    assert result["succeeded"] == 400 - refused > 0
    assert result["errors"]["429"]["retry_after_s"]["told"] == refused
    assert "requests are open" in result["errors"]["429"]["first"]
    assert result["load"] == {"request_rate": 3000.0}


async def test_latency_of_what_is_accepted_stays_bounded(pictures: Server) -> None:
    """Four times what a stage can do that takes 0.25 s a picture: it goes on at its rate, accepted requests wait for
    the queue of 8 and the batch before it at most, the others are refused at once and told when to come back."""
    slow = itertools.repeat(Call("image", "x", {"prompt": "slow", "size": "16x16"}))
    load = Load(0, 16.0, None, 4.0, 60.0, False, 0)
    async with HttpClient(pictures.url, pictures.api_key) as client:
        requests = (await run_load(client, slow, load, lambda request: None)).requests
    accepted = [request for request in requests if request.error is None]
    refused = [request for request in requests if request.error is not None]
    assert {request.error for request in refused} == {"429"}
    assert len(accepted) + len(refused) == len(requests) > 40
    assert len(refused) > len(accepted) >= 12
    assert max(request.e2e for request in accepted) < 2 * 8 * 0.25 + 1.5
    assert all(request.retry_after is not None and request.retry_after >= 1 for request in refused)
    assert sorted(request.e2e for request in refused)[len(refused) // 2] < 0.2


def test_retries(pictures: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    load = ("--request-rate", "3000", "--num-requests", "30", "--warmup", "0", "--json", str(out))
    result = figures(bench(pictures, *load, "--retry-429"), out)["results"][0]
    assert (result["succeeded"], result["errors"]) == (30, {})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workload", "tts"], "workload='tts' asks for audio; painter makes image"),
        (["--model", "x"], "model='x' is not served; there is painter, old-painter, flux"),
        (["--api-key", "wrong"], "wants a key"),
        (["--base-url", "http://127.0.0.1:9"], "no server at http://127.0.0.1:9"),
        (["--concurrency", "2", "--request-rate", "1"], "exclude each other"),
        (["--concurrency", "x"], "expected numbers"),
        (["--json", "/no/such/folder/out.json"], "no such folder"),
        (["--workload", "t3i"], "t3i"),
        (["--workload", "mixed"], "workload: 1536x1536 has 2359296 pixels; painter makes 65536 at most"),
        (["--workload", "t2i", "--shape", "512x512/2"], "shape: 512x512 has 262144 pixels"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    pictures: Server, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], with_key: None
) -> None:
    assert run(["bench", "serve", "--base-url", pictures.url, *arguments]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.out == ""


def test_no_request_that_succeeds_is_a_failure(
    pictures: Server, capsys: pytest.CaptureFixture[str], with_key: None
) -> None:
    load = ("--workload", "t2i", "--shape", "8x8/2", "--num-requests", "2")
    assert run(["bench", "serve", "--base-url", pictures.url, *load]) == 1
    assert "no request succeeded (1 at a time): 400: size: height=8" in capsys.readouterr().err


def test_speech(omni_server: Server, tmp_path: Path) -> None:
    """12 frames a request, as the test's stages make them."""
    out = tmp_path / "out.json"
    done = bench(omni_server, "--workload", "tts", "--input-tokens", "5", "--num-requests", "3", "--json", str(out))
    (result,) = figures(done, out)["results"]
    assert result["succeeded"] == 3, result["errors"]
    length = (12 * 1920 - 555) / 24000
    assert result["audio_s_per_s"] == pytest.approx(3 * length / result["wall_s"], rel=1e-3)
    assert 0 < result["ttfp"]["p50"] <= result["e2e"]["p50"]
    assert result["rtf"]["p50"] == pytest.approx(result["e2e"]["p50"] / length, rel=1e-3)
    assert "underrun" in result
    assert set(result["stages"]) == {"0", "1", "2"}


def test_chats_with_speech(omni_server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    size = ("--input-tokens", "8", "--output-tokens", "4", "--frames-per-token", "3")
    load = ("--concurrency", "2", "--num-requests", "4", "--json", str(out))
    (result,) = figures(bench(omni_server, "--workload", "omni", *size, *load), out)["results"]
    assert result["succeeded"] == 4, result["errors"]
    assert result["text_tokens_per_s"] == pytest.approx(4 * 4 / result["wall_s"])
    assert result["prompt_tokens"]["mean"] >= 8
    assert 0 < result["ttft"]["p50"] < result["e2e"]["p50"]
    assert 0 < result["ttft"]["p50"] < result["ttfp"]["p50"]
    assert result["audio_s_per_s"] > 0
