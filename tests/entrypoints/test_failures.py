"""What happens when something goes wrong: typed errors, in time, for the right requests, and nothing left behind."""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.diffusion.helpers import wait_until
from tests.entrypoints.graphs import ask, chain, stage, trace, until, write
from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.errors import (
    ConfigError,
    DeadlineError,
    RequestAborted,
    RequestError,
    StageDeadError,
    StageError,
)
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


async def states(engine: AsyncOmni) -> list[dict[str, Any]]:
    return await engine.collective_rpc("state")


def children() -> list[psutil.Process]:
    """Stages of this process. Servers that other tests share are not: they and their stages live as long as pytest."""
    return [child for child in psutil.Process().children() if any("stage_process" in word for word in child.cmdline())]


async def test_a_stage_fails_one_request(start: Start) -> None:
    engine = start(chain(2))
    good, bad = await asyncio.gather(
        collect(engine, ask("good")), collect(engine, ask("bad", fail=1)), return_exceptions=True
    )
    assert isinstance(good, list)
    assert trace(good[0]) == [0, 1]
    assert isinstance(bad, RequestError)
    assert "told to fail" in bad.message
    assert (bad.details["stage_id"], bad.details["field"]) == (1, "fail")
    assert not engine.errored
    await engine.check_health()


async def test_an_engine_that_raises_ends_its_stage(start: Start) -> None:
    engine = start(chain(2))
    other = asyncio.create_task(collect(engine, ask(hang=1)))
    await until(lambda: engine.orchestrator.open_requests == 1)
    with pytest.raises(StageDeadError, match=r"stage 1 .* told to die") as caught:
        await collect(engine, ask(die=1))
    assert caught.value.details["stage_id"] == 1
    assert "ValueError" in caught.value.message, "the traceback of the engine is in the message"
    with pytest.raises(StageDeadError):
        await other
    assert engine.errored
    assert not engine.is_running
    with pytest.raises(StageDeadError):
        await engine.check_health()
    with pytest.raises(StageDeadError):
        await collect(engine, ask())


async def test_a_killed_stage_fails_its_requests_within_a_second(start: Start) -> None:
    engine = start([stage(0, None, "text"), stage(1, [0], "audio"), stage(2, [0], "image")])
    (running,) = await collect(engine, ask(), output_modalities=["text"])
    hanging = [asyncio.create_task(collect(engine, ask(hang=1), output_modalities=["audio"])) for _ in range(5)]
    await until(lambda: engine.orchestrator.open_requests == 5)
    victim = next(child for child in children() if child.name() == "omni-stage-1")
    killed = time.monotonic()
    victim.kill()
    results = await asyncio.gather(*hanging, return_exceptions=True)
    assert time.monotonic() - killed < 1
    assert all(isinstance(result, StageDeadError) for result in results)
    assert all("SIGKILL" in str(result) for result in results)
    assert len({id(result) for result in results}) == 5
    (image,) = await collect(engine, ask(), output_modalities=["image"])
    assert image.final_output_type == "image", "what does not need the dead stage goes on"
    assert running.final_output_type == "text"


async def test_a_call_to_a_stage_that_dies_ends(start: Start) -> None:
    engine = start(chain(1))
    await collect(engine, ask())
    with pytest.raises(StageDeadError):
        await asyncio.gather(collect(engine, ask(kill=0)), engine.collective_rpc("state"))


async def test_abort_in_every_phase(start: Start) -> None:
    engine = start(chain(3), {"runtime": {"defaults": {"max_inflight": 1}}})
    for where in range(3):
        task = asyncio.create_task(collect(engine, ask(hang=where), request_id="mine"))
        await until(lambda: engine.orchestrator.open_requests == 1)
        waiting = asyncio.create_task(collect(engine, ask(), request_id="waits"))
        while not (await states(engine))[where]["hanging"]:
            await asyncio.sleep(0)
        await engine.abort("waits")
        with pytest.raises(RequestAborted):
            await waiting
        await engine.abort("min")
        assert not task.done(), "an id is not a prefix"
        await engine.abort("mine")
        await engine.abort("mine")
        with pytest.raises(RequestAborted):
            await task
        assert (await states(engine))[where]["hanging"] == []
        assert len((await states(engine))[where]["aborted"]) == 1
    (output,) = await collect(engine, ask())
    assert trace(output) == [0, 1, 2]
    await engine.abort("never seen")


async def test_abort_ends_every_request_of_the_same_id(start: Start) -> None:
    engine = start(chain(1))
    tasks = [asyncio.create_task(collect(engine, ask(hang=0), request_id="same")) for _ in range(3)]
    await until(lambda: engine.orchestrator.open_requests == 3)
    await engine.abort("same")
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, RequestAborted) for result in results)


async def test_cancelling_the_generator_aborts_once(start: Start) -> None:
    engine = start(chain(2))
    task = asyncio.create_task(collect(engine, ask(hang=1)))
    await until(lambda: engine.orchestrator.open_requests == 1)
    while not (await states(engine))[1]["hanging"]:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.orchestrator.open_requests == 0
    first, second = await states(engine)
    assert (len(first["aborted"]), len(second["aborted"])) == (0, 1)
    assert len(await collect(engine, ask())) == 1


async def test_closing_a_stream_early_aborts_the_rest(start: Start) -> None:
    engine = start(chain(1))
    stream = engine.generate(ask(chunks=1000))
    assert not (await anext(stream)).finished
    await stream.aclose()
    assert engine.orchestrator.open_requests == 0
    assert (await states(engine))[0]["queue"] == 0


async def test_a_deadline_names_stage_and_phase(start: Start) -> None:
    engine = start(chain(2), {"runtime": {"defaults": {"max_inflight": 1}}})
    with pytest.raises(DeadlineError, match=r"0\.2 s are over while running in stage 1") as caught:
        await collect(engine, ask(hang=1), timeout=0.2)
    assert (caught.value.details["stage_id"], caught.value.details["phase"]) == (1, "running in stage 1")
    blocker = asyncio.create_task(collect(engine, ask(hang=0)))
    await until(lambda: engine.orchestrator.open_requests == 1)
    with pytest.raises(DeadlineError, match="while waiting for stage 0"):
        await collect(engine, ask(), timeout=0.1)
    blocker.cancel()
    await asyncio.gather(blocker, return_exceptions=True)
    (output,) = await collect(engine, ask(), timeout=20)
    assert trace(output) == [0, 1]
    with pytest.raises(RequestError, match="timeout=0: must be a number above 0"):
        await collect(engine, ask(), timeout=0)


async def test_the_deadline_reaches_the_engine(start: Start) -> None:
    engine = start(chain(1, engine={"report": True}))
    before = time.monotonic()
    (output,) = await collect(engine, ask(), timeout=50)
    assert before + 50 <= output.multimodal_output["seen"]["deadline"] <= time.monotonic() + 50


async def test_health_of_a_stage_that_does_not_answer(start: Start) -> None:
    engine = start(chain(1))
    await engine.check_health()
    (victim,) = children()
    victim.suspend()
    with pytest.raises(DeadlineError, match=r"stage 0 did not answer check_health within 0\.2 s"):
        await engine.check_health(timeout=0.2)
    victim.resume()
    await engine.check_health()


async def test_start_fails_for_the_stage_that_refuses(start: Start) -> None:
    stages = chain(3)
    stages[1]["engine_args"]["refuse"] = "too hot"
    with pytest.raises(ConfigError, match="refused: too hot") as caught:
        start(stages)
    assert caught.value.details["stage_id"] == 1
    assert "from_config" in caught.value.details["traceback"]
    assert children() == []


@pytest.mark.parametrize(("name", "value"), [("no.such.Engine", "No module"), ("os.path.join", "is not a StageEngine")])
async def test_start_fails_for_an_engine_that_is_none(start: Start, name: str, value: str) -> None:
    stages = chain(1)
    stages[0]["engine_args"]["engine_cls"] = name
    with pytest.raises(ConfigError, match=value):
        start(stages)
    assert children() == []


async def test_shutdown_ends_requests_and_processes(start: Start) -> None:
    engine = start(chain(2))
    task = asyncio.create_task(collect(engine, ask(hang=1)))
    await until(lambda: engine.orchestrator.open_requests == 1)
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(StageDeadError, match="shut down"):
        await task
    assert children() == []
    assert engine.is_stopped
    with pytest.raises(StageDeadError, match="shut down"):
        await collect(engine, ask())


async def test_sigterm_ends_a_stage_cleanly(start: Start) -> None:
    engine = start(chain(1))
    await collect(engine, ask())
    (victim,) = children()
    victim.terminate()
    await until(lambda: engine.errored)
    assert engine.dead_error is not None
    assert engine.dead_error.details["exit_code"] == 0


DRIVER = """
import sys, time
from vllm_omni.entrypoints.omni import Omni
omni = Omni(stage_configs_path=sys.argv[1], shm_threshold_bytes=1000)
generator = omni.generate(
    [{"prompt": "x" * 100000, "additional_information": {"hang": 1, "blob": b"x" * 10_000_000}}],
    py_generator=True, use_tqdm=False)
import threading
threading.Thread(target=next, args=(generator,), daemon=True).start()
while not any(state["hanging"] for state in omni.collective_rpc("state")):
    pass
print("running", flush=True)
time.sleep(60)
"""


def mapped(pids: Iterable[object] = ("[0-9]*",)) -> str:
    """What processes have mapped: every one's, or those of ``pids``."""
    found = ""
    for maps in itertools.chain.from_iterable(Path("/proc").glob(f"{pid}/maps") for pid in pids):
        with contextlib.suppress(OSError):
            found += maps.read_text()
    return found


def orphans(before: set[str], ours: str) -> set[str]:
    """Shared memory that was not there ``before`` and that no living process has mapped: tests of others may run.

    A semaphore's maker has it mapped: one that is not in ``ours``, what our processes had mapped, is another's.
    """
    new = set(os.listdir("/dev/shm")) - before  # first: what others make from here on is not asked about
    new = {name for name in new if name in ours or not name.startswith("sem.")}
    living = mapped()
    return {name for name in new if name not in living and Path("/dev/shm", name).exists()}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_a_driver_that_is_killed(tmp_path: Path, how: signal.Signals) -> None:
    before = set(os.listdir("/dev/shm"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, write(tmp_path, chain(2))],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"running\n"
    stages = psutil.Process(driver.pid).children(recursive=True)
    assert len(stages) == 2
    ours = mapped([driver.pid, *(stage.pid for stage in stages)])
    driver.send_signal(how)
    gone, alive = psutil.wait_procs(stages, timeout=2)
    assert not alive
    assert len(gone) == 2
    driver.wait(10)
    driver.stdout.close()
    assert not os.listdir(temporary)
    left = orphans(before, ours)  # others may be making some, or ending: theirs go
    wait_until(lambda: not left & orphans(before, ours), 5.0)


async def test_an_output_that_cannot_travel_fails_its_request(start: Start) -> None:
    engine = start(chain(1))
    with pytest.raises(StageError, match=r"output additional_information\.odd: a builtins\.complex cannot travel"):
        await collect(engine, ask(odd="complex"))
    assert len(await collect(engine, ask())) == 1


async def test_a_stage_that_has_closed_ends_at_once(start: Start, tmp_path: Path) -> None:
    """Without the interpreter's tear-down: libraries print, or crash when a profile is still being taken."""
    marker = tmp_path / "torn down"
    engine = start([stage(0, final="text", engine={"at_exit": str(marker)})])
    assert len(await collect(engine, ask())) == 1
    (process,) = children()
    engine.shutdown()
    assert not process.is_running()
    assert not marker.exists()
