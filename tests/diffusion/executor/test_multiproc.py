"""Several ranks, each in a process of its own, over gloo: same pictures, agreed failures, and nobody left behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.diffusion.helpers import FAKE, alive, digest, drain, failures, fake_config, request, results, wait_until
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.errors import ConfigError, OutOfMemoryError, RequestError, StageDeadError, StageError

MIX = {
    "a": {"seed": 1, "num_inference_steps": 3},
    "b": {"seed": 2, "num_inference_steps": 6, "guidance_scale": 0.5},
    "c": {"seed": 3, "num_inference_steps": 5, "num_outputs_per_prompt": 2},
}


def two_ranks(**kwargs) -> DiffusionEngine:
    return DiffusionEngine(fake_config(cfg_parallel_size=2, max_num_seqs=4, **kwargs))


def death_of(engine: DiffusionEngine) -> str | None:
    """What ``check_health`` says, None when it says nothing."""
    try:
        engine.check_health()
    except StageDeadError as error:
        return error.message
    return None


@pytest.fixture(scope="module")
def engine() -> Iterator[DiffusionEngine]:
    """Shared by the tests; in the end a rank is killed while idle, which makes the stage unhealthy within a second."""
    engine = two_ranks()
    yield engine
    pids = engine.info().pids
    engine.check_health()
    os.kill(pids[1], signal.SIGKILL)
    # The first thread of a process can be gone while others still hold its files: ask for what counts.
    wait_until(lambda: (death_of(engine) or "").find("killed by signal 9") >= 0, 1.0)
    engine.close()
    assert not any(alive(pid) for pid in pids)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test both ranks of the shared engine hold no request."""
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        assert not engine.has_work()
        assert engine.call("held") == [[], []]


def test_info(engine: DiffusionEngine) -> None:
    info = engine.info()
    assert info.ranks == 2
    assert len(info.pids) == 2
    assert all(alive(pid) and pid != os.getpid() for pid in info.pids)
    assert [Path(f"/proc/{pid}/comm").read_text().strip() for pid in info.pids] == ["omni-rank0", "omni-rank1"]


def test_two_ranks_make_the_pictures_of_one(engine: DiffusionEngine) -> None:
    single = DiffusionEngine(fake_config())
    for name, params in MIX.items():
        engine.add_request(request(name, prompt=name, **params))
        single.add_request(request(name, prompt=name, **params))
    ours, theirs = results(drain(engine)), results(drain(single))
    single.close()
    assert {name: digest(data) for name, data in ours.items()} == {n: digest(d) for n, d in theirs.items()}
    assert max(ours["b"]["metrics"]["batch_sizes"]) == 3


def test_calls_reach_every_rank(engine: DiffusionEngine) -> None:
    assert engine.call("whoami", ("rank ",)) == ["rank 0", "rank 1"]
    with pytest.raises(StageError, match="the extension failed") as caught:
        engine.call("explode")
    assert "fake_pipeline.py" in caught.value.details["cause"]
    with pytest.raises(RequestError, match="no method"):
        engine.call("nothing")
    engine.check_health()


def test_profiles_of_every_rank(engine: DiffusionEngine, tmp_path: Path) -> None:
    engine.start_profile(str(tmp_path))
    engine.add_request(request("a"))
    drain(engine)
    paths = engine.stop_profile()
    assert len(set(paths)) == 2
    for path in paths:
        names = [event["name"] for event in json.loads(Path(path).read_text())["traceEvents"]]
        assert names.count("omni.denoise") >= 4


def test_bad_input_fails_that_request_alone(engine: DiffusionEngine) -> None:
    engine.add_request(request("good"))
    engine.add_request(request("bad", height=63))
    events = drain(engine)
    assert isinstance(failures(events)["bad"], RequestError)
    assert "good" in results(events)


@pytest.mark.parametrize("rank", [0, 1, None])
@pytest.mark.parametrize(
    ("phase", "middle"), [("encode", False), ("denoise", False), ("denoise", True), ("decode", False)]
)
def test_a_failure_on_any_rank_is_agreed_on(
    engine: DiffusionEngine, phase: str, middle: bool, rank: int | None
) -> None:
    """One rank fails, perhaps between two collectives: nobody hangs, one request fails, the next ones are right."""
    engine.add_request(request("a", seed=1))
    expected = digest(results(drain(engine))["a"])
    fail = {"phase": phase, "kind": "oom", "middle": middle, **({} if rank is None else {"rank": rank})}
    engine.add_request(request("bad", extra_args={"fail": fail}))
    events = drain(engine)
    error = failures(events)["bad"]
    assert type(error) is OutOfMemoryError
    assert error.details["phase"] == phase
    assert engine.call("held") == [[], []]
    engine.add_request(request("a", seed=1))
    assert digest(results(drain(engine))["a"]) == expected


def test_an_error_on_one_rank_tells_its_cause(engine: DiffusionEngine) -> None:
    fail = {"phase": "denoise", "kind": "error", "rank": 1, "middle": True, "step": 1}
    engine.add_request(request("bad", extra_args={"fail": fail}))
    error = failures(drain(engine))["bad"]
    assert type(error) is StageError
    assert "made to fail by the test" in error.message


def test_a_batch_out_of_memory_on_every_rank_is_tried_again(engine: DiffusionEngine) -> None:
    fail = {"phase": "denoise", "kind": "oom", "over": 2}
    for name in "abc":
        engine.add_request(request(name, seed=1, extra_args={"fail": fail}))
    events = drain(engine)
    assert set(results(events)) == set("abc")
    assert len({digest(data) for data in results(events).values()}) == 1


def test_abort_reaches_every_rank(engine: DiffusionEngine) -> None:
    engine.add_request(request("keep"))
    engine.add_request(request("gone", num_inference_steps=50))
    for _ in range(4):
        engine.step()
    engine.abort(["gone"])
    assert {event.request_id for event in drain(engine)} == {"keep"}


def test_a_killed_rank_is_noticed_within_a_second(tmp_path: Path) -> None:
    """Here while it computes (the gate holds the step); an idle rank that is gone makes the stage unhealthy."""
    engine = two_ranks()
    pids = engine.info().pids
    engine.check_health()
    engine.add_request(request("a", extra_args={"gate": str(tmp_path / "never")}))
    engine.step()
    killer = f"import os, time; time.sleep(0.3); print(time.monotonic(), flush=True); os.kill({pids[1]}, 9)"
    process = subprocess.Popen([sys.executable, "-c", killer], stdout=subprocess.PIPE, text=True)
    with pytest.raises(StageDeadError, match="killed by signal 9"):
        drain(engine)
    noticed = time.monotonic()
    killed = float(process.communicate()[0])
    assert noticed - killed < 1.0
    with pytest.raises(StageDeadError, match="killed by signal 9"):
        engine.check_health()
    engine.close()
    assert not any(alive(pid) for pid in pids)


def test_nobody_survives_a_killed_engine(tmp_path: Path) -> None:
    """SIGKILL of the process that holds the engine, in the middle of a step: its ranks go, and so do their files."""
    script = tmp_path / "holder.py"
    script.write_text(
        textwrap.dedent(f"""
        from tests.diffusion.helpers import drain, fake_config, request
        from vllm_omni.diffusion.diffusion_engine import DiffusionEngine

        if __name__ == "__main__":
            engine = DiffusionEngine(fake_config(cfg_parallel_size=2))
            engine.add_request(request("a", extra_args={{"gate": {str(tmp_path / "never")!r}}}))
            engine.step()
            engine.check_health()
            print(*engine.info().pids, flush=True)
            drain(engine)
        """)
    )
    before = set(os.listdir("/dev/shm"))
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    process.kill()
    process.wait()
    wait_until(lambda: not any(alive(pid) for pid in pids), 2.0)
    process.stdout.close()
    left = {name for name in set(os.listdir("/dev/shm")) - before if any(str(pid) in name for pid in pids)}
    assert not left


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"custom_pipeline_args": {"pipeline_class": f"{FAKE}.Missing"}}, "custom_pipeline_args"),
        ({"devices": "0,0"}, "devices"),
    ],
)
def test_a_rank_that_cannot_start_says_why(kwargs: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        two_ranks(**kwargs)
    assert caught.value.details["field"] == field


def test_the_engine_s_process_stays_light() -> None:
    """With ranks of its own it loads neither vLLM nor models, which would cost seconds and a gigabyte."""
    code = (
        "import sys, vllm_omni.diffusion.diffusion_engine, vllm_omni.diffusion.executor.multiproc_executor;"
        "sys.exit(any(name in sys.modules for name in ('vllm', 'diffusers', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
