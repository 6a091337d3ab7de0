"""Stages that hang are noticed in a bounded time; stages that work long are left alone."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.diffusion.helpers import FAKE, wait_until
from tests.entrypoints.graphs import ask, stage, write
from vllm_omni import pulse
from vllm_omni.engine.stage_seam import Vitals
from vllm_omni.entrypoints import watch
from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.errors import ConfigError, StageDeadError
from vllm_omni.process import WatchedProcess

HANGING = "tests.entrypoints.hanging_stage.HangingStage"


HEARTBEAT_S, STALL_S = 3.0, 1.5
"""A busy machine may let a process wait for a second; an endless loop is told from that by its stall alone."""


@pytest.fixture
def before() -> set[psutil.Process]:
    """Processes that other tests started and share."""
    return set(psutil.Process().children(recursive=True))


@pytest.fixture
async def engine(before: set[psutil.Process], tmp_path: Path) -> AsyncIterator[AsyncOmni]:
    """One stage that hangs when told to, and one beside it."""
    stages = [stage(i, final="text", engine={"engine_cls": HANGING}) for i in (0, 1)]
    limits = {"heartbeat_timeout": HEARTBEAT_S, "stall_timeout": STALL_S}
    engine = AsyncOmni(stage_configs_path=write(tmp_path, stages), **limits)
    yield engine
    engine.shutdown()


async def run(engine: AsyncOmni, prompt: Any, timeout: float = 20) -> int:
    return len([output async for output in engine.generate(prompt, timeout=timeout)])


@pytest.mark.parametrize(
    ("how", "limit", "words"),
    [("freeze", STALL_S, "no sign of life|has not moved"), ("loop", STALL_S, "has not moved")],
)
async def test_a_stage_that_hangs(
    before: set[psutil.Process], engine: AsyncOmni, how: str, limit: float, words: str
) -> None:
    """Its requests fail typed, soon after the limit; health says why; nothing is left."""
    assert await run(engine, "hello") == 2
    mine = set(psutil.Process().children(recursive=True)) - before
    begun = time.monotonic()
    with pytest.raises(StageDeadError, match=words) as caught:
        await run(engine, ask(**{how: True}))
    assert limit <= time.monotonic() - begun < limit + 4
    assert caught.value.details["stage_id"] in (0, 1)
    with pytest.raises(StageDeadError, match=words):
        engine.check_alive()
    with pytest.raises(StageDeadError):
        await run(engine, "more")
    begun = time.monotonic()
    engine.shutdown()
    assert time.monotonic() - begun < 10
    assert not [child for child in mine if child.is_running() and any("stage_process" in w for w in child.cmdline())]


async def test_long_work_is_no_hang(engine: AsyncOmni) -> None:
    """Four times the limit in one step, with a sign after each layer; and a call that takes longer than the limit."""
    assert await run(engine, ask(layers=60)) == 2
    engine.check_alive()


async def test_an_idle_stage_that_is_frozen(engine: AsyncOmni) -> None:
    """There need be no request for it to be noticed."""
    await engine.attach()
    pid = engine._clients[1].vitals()
    assert pid is not None
    (victim,) = {p.pid for p in engine._clients[1]._handle.pulse.read()}  # type: ignore[attr-defined]
    os.kill(victim, signal.SIGSTOP)
    begun = time.monotonic()
    while not engine.errored:
        await asyncio.sleep(0.02)
        assert time.monotonic() - begun < HEARTBEAT_S + 4
    with pytest.raises(StageDeadError, match=r"stage 1: .* no sign of life"):
        engine.check_alive()


async def test_a_rank_that_is_frozen(tmp_path: Path) -> None:
    """Of a stage whose ranks are processes: the rank is named, and dies with its stage."""
    args = {
        "model": "fake",
        "model_class_name": "FluxPipeline",
        "device": "cpu",
        "diffusion_load_format": "dummy",
        "custom_pipeline_args": {"pipeline_class": f"{FAKE}.FakePipeline"},
        "distributed_executor_backend": "mp",
    }
    row = {"stage_id": 0, "stage_type": "diffusion", "final_output": True, "final_output_type": "image"}
    engine = AsyncOmni(
        stage_configs_path=write(tmp_path, [{**row, "engine_args": args}]), heartbeat_timeout=HEARTBEAT_S
    )
    try:
        (rank,) = engine.stage_infos[0].pids
        process = WatchedProcess(rank)
        os.kill(rank, signal.SIGSTOP)
        with pytest.raises(StageDeadError, match=rf"rank 0 \(pid {rank}\) hangs"):
            await run(engine, "a cup")
    finally:
        engine.shutdown()
    wait_until(lambda: not process.is_alive(), 5)


def test_only_time_of_looking_counts() -> None:
    """A driver that was stopped itself does not blame its stages for the time it slept."""
    still = watch._StageWatch()
    vitals = Vitals({"its process": 7}, 3, True, None)
    assert still.reason(vitals, 0.5, 2.0, 3.0) is None
    for _ in range(3):
        assert still.reason(vitals, 0.5, 2.0, 3.0) is None
    assert "its process hangs" in str(still.reason(vitals, 0.5, 2.0, 3.0))
    assert "its work hangs" in str(still.reason(vitals, 1.0, 0.0, 3.0))
    moved = Vitals({"its process": 8}, 4, True, None)
    assert still.reason(moved, 1.0, 2.0, 3.0) is None
    idle = Vitals({"its process": 9}, 4, False, None)
    assert all(still.reason(idle, 1.0, 0.0, 3.0) is None for _ in range(9))


async def test_a_machine_that_slept_blames_nobody() -> None:
    """A hundred seconds passed, of which it looked for a moment."""

    class Client:
        given_up: list[StageDeadError] = []  # noqa: RUF012

        def vitals(self) -> Vitals:
            return Vitals({"its process": 7}, 3, True, None)

        def give_up(self, error: StageDeadError) -> None:
            self.given_up.append(error)

    client = Client()
    watching = watch.Watch({0: client}, 8.0, 8.0)  # type: ignore[dict-item]
    watching.start()
    for _ in range(2):
        watching._looked -= 100
        watching._tick()
    assert not client.given_up
    for _ in range(9):
        watching._looked -= 100
        watching._tick()
    watching.stop()
    assert len(client.given_up) == 1


def test_page() -> None:
    """A process writes, another reads; what it wrote last can be read after it is gone."""
    page = pulse.PulsePage()
    try:
        assert page.read() == []
        code = (
            "import sys; from vllm_omni import pulse; assert pulse.path() is None; pulse.busy(1, 1);"
            f"pulse.start({page.fd}, slot=2); pulse.busy(3, 4); pulse.advance(); print(pulse.path())"
        )
        out = subprocess.run([sys.executable, "-c", code], pass_fds=[page.fd], check=True, capture_output=True)
        (one,) = page.read()
        assert (one.slot, one.progress, one.busy, one.queued, one.running) == (2, 2, True, 3, 4)
        assert one.beat >= 1
        assert out.stdout.decode().strip() == f"/proc/{one.pid}/fd/{page.fd}"
    finally:
        page.close()
        page.close()
    assert mmap.PAGESIZE >= pulse.SLOTS * 64


@pytest.mark.parametrize("name", ["heartbeat_timeout", "stall_timeout"])
def test_wrong_limits(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        AsyncOmni("none", **{name: -1})
