"""``LoopThread``: what is under way when it ends, and what comes after."""

import asyncio
import threading

import pytest

from vllm_omni.entrypoints.loop_thread import LoopThread
from vllm_omni.errors import StageDeadError


async def one() -> int:
    return 1


def test_results_and_errors_come_back() -> None:
    async def fails() -> None:
        raise KeyError("x")

    loop = LoopThread("test")
    assert loop.run(one()) == 1
    with pytest.raises(KeyError):
        loop.run(fails())
    loop.stop()


def test_whoever_waits_when_it_ends_is_told() -> None:
    loop, waits, ended = LoopThread("test"), threading.Event(), threading.Event()
    errors: list[BaseException] = []

    async def wait() -> None:
        waits.set()
        await asyncio.Event().wait()

    def caller() -> None:
        try:
            loop.run(wait())
        except StageDeadError as error:
            errors.append(error)

    thread = threading.Thread(target=caller)
    thread.start()
    assert waits.wait(10)
    loop.stop(ended.set)
    assert ended.is_set()
    thread.join(10)
    assert [str(error) for error in errors] == ["the engine was closed"]


def test_nothing_comes_after_its_end() -> None:
    loop = LoopThread("test")
    loop.stop()
    with pytest.raises(StageDeadError, match="is closed"):
        loop.run(one())
    with pytest.raises(StageDeadError, match="is closed"):
        loop.call_soon(print)


def test_an_error_of_the_last_call_is_the_callers_and_the_thread_ends() -> None:
    def fails() -> None:
        raise KeyError("x")

    loop = LoopThread("a loop that fails at its end")
    with pytest.raises(KeyError):
        loop.stop(fails)
    assert not [thread for thread in threading.enumerate() if thread.name == "a loop that fails at its end"]
