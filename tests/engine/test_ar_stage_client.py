"""Three engine processes under the orchestrator: thinker -> talker -> vocoder, streamed, with requests that go away."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import random
import select
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm.envs
from vllm.sampling_params import RequestOutputKind, SamplingParams

from tests.ar_models import HIDDEN, save_lm
from tests.ar_support import SMALL
from tests.ar_toy import save_talker, save_vocoder, talk
from vllm_omni.distributed.omni_connectors.utils.arena import Arena
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec, LeafRef, resolve
from vllm_omni.engine.ar_launch import ARStageHandle, ARStageSpec, end_ar_stages, launch_ar_stages, start_ar_stages
from vllm_omni.engine.ar_stage_client import ARStageClient
from vllm_omni.entrypoints.orchestrator import Orchestrator
from vllm_omni.entrypoints.stage_graph import StageGraph, StageNode
from vllm_omni.errors import ConfigError, DeadlineError, OmniError, RequestError, StageDeadError
from vllm_omni.inputs.edge import EdgeInput
from vllm_omni.request import OmniRequest

WORDS, STEPS = 10, 16
THINK = SamplingParams(temperature=0.0, max_tokens=WORDS, ignore_eos=True)
TALK = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True, detokenize=False)


PASSED: set[tuple[int, bool]] = set()
"""(rows of a prompt, whether they stayed in shared memory on their way through the driver)."""


def to_talker(edge: EdgeInput) -> dict[str, Any] | None:
    """The prompt's states open the request, each later row conditions one step. Works for one chunk and for many."""
    rows = [chunk["hidden.2"] for chunk in edge.outputs[0] if "hidden.2" in chunk]
    if edge.chunk == 0:
        first, rest = rows[0], rows[1:]
        PASSED.add((first.shape[0], isinstance(first, LeafRef)))
        info: dict[str, Any] = {"prompt": first}
        length = first.shape[0]
    else:
        info, rest, length = {}, rows, 1
    if rest:
        info["cond"] = rest[0] if len(rest) == 1 else torch.cat([resolve(row) for row in rest])
    if not info and edge.last:
        return None
    return {"prompt_token_ids": [0] * length, "additional_information": info, "conditioning_steps": len(rest)}


def to_vocoder(edge: EdgeInput) -> dict[str, Any] | None:
    """New frames with one frame of context."""
    frames = [chunk["codes"] for chunk in edge.outputs[1]]
    if not frames:
        return None
    before = edge.carry.get("last")
    edge.carry["last"] = frames[-1]
    codes = torch.stack([*([] if before is None else [before]), *frames])
    return {"additional_information": {"codes": codes, "context": int(before is not None)}}


def graph(window: int) -> StageGraph:
    return StageGraph(
        [
            StageNode(0, (), (1,), True, "text"),
            StageNode(1, (0,), (2,), process_input=to_talker, windows={0: 1 if window > 0 else -1}),
            StageNode(2, (1,), (), True, "audio", process_input=to_vocoder, windows={1: window}),
        ]
    )


class Environment:
    """Worker extension."""

    def variable(self, name: str) -> str | None:
        """Of the worker's process."""
        return os.environ.get(name)


class World:
    """The running stages and their plain torch counterparts."""

    def __init__(self, folder: Path) -> None:
        for name in ("thinker", "talker", "vocoder"):
            (folder / name).mkdir()
        self.lm = save_lm(folder / "thinker")
        self.body, self.predictor = save_talker(folder / "talker")
        self.wave = save_vocoder(folder / "vocoder")
        lm = {**SMALL, "model": str(folder / "thinker"), "worker_extension_cls": f"{__name__}.Environment"}
        self.specs = [
            ARStageSpec(0, "ar", {**lm, "hidden_layers": [2]}, threshold=4096, env={"OF_STAGE_0": "yes"}),
            ARStageSpec(
                1, "ar", {**SMALL, "model": str(folder / "talker"), "model_arch": "ToyTalker", "model_stage": "talker"}
            ),
            ARStageSpec(
                2, "generation", {**SMALL, "model": str(folder / "vocoder"), "model_arch": "ToyVocoder"}, threshold=256
            ),
        ]

    @torch.inference_mode()
    def expect(self, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
        out = self.lm.generate(torch.tensor([prompt]), max_new_tokens=WORDS, do_sample=False, eos_token_id=None)
        states = self.lm(out[:, :-1], output_hidden_states=True).hidden_states[2][0]
        _, codes = talk(self.body, self.predictor, states[: len(prompt)], states[len(prompt) :], STEPS)
        return out[0, len(prompt) :].tolist(), self.wave(codes[None])[0]


def fork(specs: list[ARStageSpec]) -> list[ARStageHandle]:
    """Start engines as forks of this process, which has everything imported: a fraction of a spawn's time."""
    configs = [(spec, spec.config()) for spec in specs]
    vllm.envs.disable_envs_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
        gc.collect()
        gc.freeze()
        handles = start_ar_stages(configs, 60.0)
        gc.unfreeze()
    return handles


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def handles(world: World) -> Iterator[list[ARStageHandle]]:
    handles = fork(world.specs)
    pids = [pid for handle in handles for pid in handle.info.pids]
    yield handles
    end_ar_stages(handles)
    codes = [process.exitcode for handle in handles for process in handle.processes]
    assert codes == [0] * len(handles), "they end by themselves, also on a busy machine"
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


class Sink:
    """Collects what a request gets."""

    def __init__(self) -> None:
        self.outputs: list[tuple[int, dict[str, Any], bool]] = []
        self.error: OmniError | None = None
        self.ended = asyncio.Event()

    def on_output(self, stage_id: int, data: dict[str, Any], finished: bool, metrics: dict[str, Any]) -> None:
        self.outputs.append((stage_id, data, finished))

    def on_progress(self, stage_id: int, step: int, total: int) -> None:
        pass

    def on_end(self, error: OmniError | None) -> None:
        self.error = error
        self.ended.set()

    @property
    def tokens(self) -> list[int]:
        """Of the last text: vLLM's outputs hold it from its beginning."""
        texts = [data["request_output"] for stage, data, _ in self.outputs if stage == 0]
        return list(texts[-1].outputs[0].token_ids)

    @property
    def audio(self) -> torch.Tensor:
        return torch.cat([resolve(data)["audio"] for stage, data, _ in self.outputs if stage == 2 and data])


@pytest.fixture
async def run(handles: list[ARStageHandle]) -> AsyncIterator[Any]:
    """Makes orchestrators over the running stages; one loop a test."""
    made: list[ARStageClient] = []
    arena = Arena()

    async def make(window: int) -> Orchestrator:
        clients = [ARStageClient(handle, Codec(arena)) for handle in handles]
        made.extend(clients)
        orchestrator = Orchestrator(graph(window), {client.stage_id: client for client in clients})
        await orchestrator.attach()
        return orchestrator

    yield make
    for client in made:
        client.detach()
    arena.close()


def request(name: str, prompt: Any, modalities: list[str] | None = None, think: SamplingParams = THINK) -> OmniRequest:
    return OmniRequest(name, prompt, {0: think, 1: TALK, 2: SamplingParams()}, modalities)


@pytest.mark.parametrize("window", [-1, 3])
async def test_chain(world: World, run: Any, window: int) -> None:
    """Whole or streamed, several requests at once: text and sound equal plain torch's."""
    orchestrator = await run(window)
    PASSED.clear()
    prompts = [list(range(3, 3 + n)) for n in (6, 40, 11)]
    sinks = []
    for number, prompt in enumerate(prompts):
        sinks.append(Sink())
        orchestrator.open(request(f"r{number}", {"prompt_token_ids": prompt}), sinks[-1])
    for sink, prompt in zip(sinks, prompts, strict=True):
        await asyncio.wait_for(sink.ended.wait(), 30)
        assert sink.error is None
        tokens, wave = world.expect(prompt)
        assert sink.tokens == tokens
        torch.testing.assert_close(sink.audio, wave, atol=1e-5, rtol=1e-5)
        order = [stage for stage, _, _ in sink.outputs]
        if window > 0:
            assert order.count(2) == 6
    assert sorted(PASSED) == [(n, n * HIDDEN * 4 > 4096) for n in (6, 11, 40)]


async def test_text_prompt_and_kinds(world: World, run: Any) -> None:
    """Text goes through the tokenizer beside the loop; ``output_kind`` is the caller's; no sound is made unasked."""
    orchestrator = await run(3)
    delta = SamplingParams(temperature=0.0, max_tokens=WORDS, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    sinks = [Sink(), Sink()]
    for sink, params in zip(sinks, (THINK, delta), strict=True):
        orchestrator.open(request("text", "say it again", ["text"], params), sink)
        await asyncio.wait_for(sink.ended.wait(), 30)
        assert {stage for stage, _, _ in sink.outputs} == {0}
        assert not any(name.startswith("hidden") for _, data, _ in sink.outputs for name in data)
    whole = [data["request_output"].outputs[0].text for _, data, _ in sinks[0].outputs]
    parts = [data["request_output"].outputs[0].text for _, data, _ in sinks[1].outputs]
    assert whole[-1] == "".join(parts)
    assert len(parts) == WORDS
    assert sinks[0].outputs[-1][1]["request_output"].outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ({"prompt_token_ids": [1] * 300}, THINK, "prompt"),
        ({"prompt": "hi", "multi_modal_data": {"image": object()}}, THINK, "prompt"),
        ({"prompt_token_ids": []}, THINK, "prompt"),
        ({"prompt": "hi", "priority": 2}, THINK, "priority"),
        ({"prompt": "hi", "lora_request": "x"}, THINK, "lora_request"),
        ({"prompt": "hi", "multi_modal": 1}, THINK, "multi_modal"),
    ],
)
async def test_bad_input(run: Any, prompt: Any, params: SamplingParams, field: str) -> None:
    orchestrator = await run(3)
    sink = Sink()
    try:
        orchestrator.open(request("bad", prompt, ["text"], params), sink)
        await asyncio.wait_for(sink.ended.wait(), 30)
        error = sink.error
    except RequestError as raised:
        error = raised
    assert isinstance(error, RequestError)
    assert error.details["field"] == field
    assert orchestrator.open_requests == 0


async def test_several_answers(run: Any) -> None:
    """Of text alone. A request that goes away with some of its answers made leaves none behind."""
    orchestrator = await run(3)
    client = orchestrator._clients[0]
    for kind in (RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE):
        three = SamplingParams(n=3, temperature=1.0, max_tokens=WORDS, ignore_eos=True, output_kind=kind)
        sink = Sink()
        orchestrator.open(request("many", "say", ["text"], three), sink)
        await asyncio.wait_for(sink.ended.wait(), 30)
        assert sink.error is None
        made = [data["request_output"] for _, data, _ in sink.outputs]
        answers = {answer.index: answer for output in made for answer in output.outputs}
        assert sorted(answers) == [0, 1, 2]
        assert [len(answer.token_ids) for answer in answers.values()] == [WORDS] * 3
        assert [output.finished for output in made] == [False] * (len(made) - 1) + [True]
        assert (len(made) == 1) is (kind is RequestOutputKind.FINAL_ONLY)
    spoken, left = Sink(), Sink()
    orchestrator.open(request("spoken", "say", None, three), spoken)
    await asyncio.wait_for(spoken.ended.wait(), 30)
    assert isinstance(spoken.error, RequestError)
    assert spoken.error.details["field"] == "n"
    key = orchestrator.open(request("left", "say", ["text"], three), left)
    while not left.outputs:
        await asyncio.sleep(0)
    orchestrator.abort(key)
    assert not client._open
    assert not client._outputs.request_states
    assert not client._outputs._asked_by
    assert not client._outputs.parent_requests
    again = Sink()
    orchestrator.open(request("again", "say", ["text"]), again)
    await asyncio.wait_for(again.ended.wait(), 30)
    counts = await client.call("call", "omni_counts", [], {}, timeout=30)
    assert counts == [{"requests": 0, "busy_segments": 0}]


async def test_processor_that_breaks(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of another kind out of tokenisation or media processing fails that request, not the stage."""
    orchestrator = await run(3)
    inputs = orchestrator._clients[0]._inputs

    def broken(prompt: Any) -> Any:
        raise IndexError("pixel 7")

    monkeypatch.setattr(inputs, "_render", broken)
    sinks = [Sink(), Sink()]
    orchestrator.open(request("bad", "say", ["text"]), sinks[0])
    await asyncio.wait_for(sinks[0].ended.wait(), 30)
    assert isinstance(sinks[0].error, RequestError)
    assert "IndexError: pixel 7" in str(sinks[0].error)
    monkeypatch.undo()
    orchestrator.open(request("good", "say", ["text"]), sinks[1])
    await asyncio.wait_for(sinks[1].ended.wait(), 30)
    assert sinks[1].error is None


async def test_aborts_under_load(world: World, run: Any) -> None:
    """Fifty requests, twenty of them given up at random points: the others are as if alone, and nothing is left."""
    orchestrator = await run(4)
    chance = random.Random(5)
    prompts = {f"q{i}": list(range(1 + i, 1 + i + chance.randrange(4, 60))) for i in range(50)}
    leaving = set(chance.sample(sorted(prompts), 20))
    sinks = {name: Sink() for name in prompts}

    async def one(name: str) -> None:
        key = orchestrator.open(request(name, {"prompt_token_ids": prompts[name]}), sinks[name])
        if name in leaving:
            target = chance.randrange(0, 20)
            while len(sinks[name].outputs) < target and not sinks[name].ended.is_set():
                await asyncio.sleep(0)
            orchestrator.abort(key)
        await asyncio.wait_for(sinks[name].ended.wait(), 60)

    await asyncio.gather(*(one(name) for name in prompts))
    for name in sorted(prompts.keys() - leaving)[::6]:
        tokens, wave = world.expect(prompts[name])
        assert sinks[name].error is None
        assert sinks[name].tokens == tokens
        torch.testing.assert_close(sinks[name].audio, wave, atol=1e-5, rtol=1e-5)
    for name in prompts.keys() - leaving:
        assert sinks[name].error is None
        assert len(sinks[name].tokens) == WORDS
    assert orchestrator.open_requests == 0
    clients = orchestrator._clients.values()
    assert not [client._open for client in clients if client._open]  # type: ignore[attr-defined]
    sinks.clear()
    again = Sink()
    orchestrator.open(request("again", {"prompt_token_ids": [5, 6, 7, 8]}), again)
    await asyncio.wait_for(again.ended.wait(), 30)
    assert again.tokens == world.expect([5, 6, 7, 8])[0]
    for client in clients:
        counts = await client.call("call", "omni_counts", [], {}, timeout=30)
        assert counts == [{"requests": 0, "busy_segments": 0}]


async def test_calls(run: Any) -> None:
    orchestrator = await run(3)
    for client in orchestrator._clients.values():
        await client.call("check_health", timeout=20)
        with pytest.raises(OmniError, match="nonsense"):
            await client.call("call", "nonsense", [], {}, timeout=20)
        with pytest.raises(DeadlineError):
            await client.call("check_health", timeout=0.0)


async def test_a_stage_gets_what_is_put_into_its_environment(run: Any) -> None:
    thinker = (await run(3))._clients[0]
    assert await thinker.call("call", "variable", ["OF_STAGE_0"], {}, timeout=20) == ["yes"]
    assert "OF_STAGE_0" not in os.environ


async def test_death(world: World) -> None:
    """A stage that dies fails its open requests with a typed error, at once; nothing is left of it."""
    (handle,) = fork(world.specs[:1])
    client = ARStageClient(handle, Codec(Arena()))
    orchestrator = Orchestrator(StageGraph([StageNode(0, (), (), True)]), {0: client})
    await orchestrator.attach()
    sinks = [Sink(), Sink()]
    long = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    for sink in sinks:
        orchestrator.open(OmniRequest("x", {"prompt_token_ids": [1, 2, 3]}, {0: long}), sink)
    while not all(sink.outputs for sink in sinks):
        await asyncio.sleep(0)
    os.kill(handle.pid, signal.SIGKILL)
    for sink in sinks:
        await asyncio.wait_for(sink.ended.wait(), 5)
        assert isinstance(sink.error, StageDeadError)
        assert "stage 0" in str(sink.error)
    with pytest.raises(StageDeadError):
        orchestrator.open(OmniRequest("x", {"prompt_token_ids": [1]}, {0: long}), Sink())
    client.detach()
    assert os.listdir(handle.runtime.path)
    handle.close()
    assert not os.path.exists(f"/proc/{handle.pid}")
    assert not handle.runtime.path.exists()


def test_bad_settings_start_nothing(world: World) -> None:
    good = world.specs[0]
    for change, words in (
        ({"hidden_layers": [9]}, "hidden_layers"),
        ({"hiden_layers": [1]}, "did you mean 'hidden_layers'"),
        ({"worker_cls": "x.y"}, "worker_extension_cls"),
        ({"pipeline_parallel_size": 2}, "tensor_parallel_size"),
        ({"model_arch": "ToyTalkr"}, "did you mean 'ToyTalker'"),
        ({"model_arch": "ToyVocoder", "hidden_layers": []}, "omni_generate"),
        ({"hf_config_name": "talker_config"}, "hf_config_name"),
        ({"worker_type": "generation"}, "worker_type"),
        ({"max_model_len": "many"}, "max_model_len"),
        ({"async_chunk": True}, "stage configuration itself"),
        ({"stage_connector_config": {}}, "output_connectors"),
        ({"engine_output_type": "audio"}, "engine_output_type"),
        ({"omni_kv_config": {}}, "omni_kv_config"),
        ({"watermark_config": {"key": 1}}, "V2 model runner"),
    ):
        bad = ARStageSpec(3, "ar", {**good.engine_args, **change})
        with pytest.raises(ConfigError, match=words):
            launch_ar_stages([good, bad], 5.0)


def test_start_takes_too_long(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tempfile.mkdtemp(prefix="omni-test-")
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", folder)
    with pytest.raises(DeadlineError, match="stage_init_timeout"):
        launch_ar_stages(world.specs[:1], 0.2)
    os.rmdir(folder)  # nothing is left in it


def test_engine_dies_with_its_driver(world: World) -> None:
    """A driver that is killed takes its engines with it, and they their files."""
    ours, theirs = multiprocessing.Pipe()

    def drive() -> None:
        (handle,) = fork(world.specs[:1])
        theirs.send((handle.pid, handle.runtime.path))
        theirs.recv()

    driver = multiprocessing.get_context("fork").Process(target=drive)
    driver.start()
    assert ours.poll(60)
    pid, folder = ours.recv()
    assert os.listdir(folder)
    engine = os.pidfd_open(pid)
    driver.kill()
    driver.join()
    assert select.select([engine], [], [], 10)[0]
    os.close(engine)
    assert not folder.exists()
