"""Two tensor-parallel ranks give what one gives; payloads reach both and leave once."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest
import torch
from vllm.sampling_params import SamplingParams

from tests.ar_models import HIDDEN, save_lm
from tests.ar_support import SMALL
from vllm_omni.distributed.omni_connectors.utils.arena import Arena
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec, resolve
from vllm_omni.engine.ar_launch import ARStageHandle, ARStageSpec, end_ar_stages, launch_ar_stages
from vllm_omni.engine.ar_stage_client import ARStageClient
from vllm_omni.engine.stage_seam import StageOutput
from vllm_omni.errors import OmniError, StageDeadError


def shared_names(engine: int) -> set[str]:
    """Names in /dev/shm that an engine and its ranks have mapped."""
    family = [engine, *(child.pid for child in psutil.Process(engine).children(recursive=True))]
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in family)
    return {name for name in os.listdir("/dev/shm") if name in maps}


class Listener:
    """Collects what a stage says."""

    def __init__(self) -> None:
        self.outputs: list[StageOutput] = []
        self.errors: list[OmniError] = []
        self.ended = asyncio.Event()

    def on_output(self, stage_id: int, output: StageOutput) -> None:
        self.outputs.append(output)
        if output.finished:
            self.ended.set()

    def on_progress(self, stage_id: int, request_id: str, step: int, total: int) -> None:
        pass

    def on_failure(self, stage_id: int, request_id: str, error: OmniError) -> None:
        self.errors.append(error)
        self.ended.set()

    def on_dead(self, stage_id: int, error: StageDeadError) -> None:
        self.errors.append(error)
        self.ended.set()


@pytest.mark.slow
async def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spawned, as for users: two workers below one engine."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM's own choice wants a NUMA node a rank
    model = save_lm(tmp_path, "qwen3", heads=(2, 2))
    args = {**SMALL, "model": str(tmp_path), "hidden_layers": [1, -1], "tensor_parallel_size": 2}
    args["distributed_executor_backend"] = "mp"
    handles = await asyncio.to_thread(launch_ar_stages, [ARStageSpec(0, "ar", args, threshold=1024)], 200.0)
    named = shared_names(handles[0].pid)
    assert any(name.startswith("psm_") for name in named)
    assert not [name for name in named if "cpushm" in name], "the memory over which ranks talk has no name"
    try:
        listener, arena = Listener(), Arena()
        client = ARStageClient(handles[0], Codec(arena))
        await client.attach(listener)
        prompt = list(range(5, 45))
        params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        client.submit("r", {"prompt_token_ids": prompt}, params, None, 0, True)
        await asyncio.wait_for(listener.ended.wait(), 60)
        assert not listener.errors
        with torch.inference_mode():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
            states = model(out[:, :-1], output_hidden_states=True).hidden_states
        data = [resolve(output.data) for output in listener.outputs]
        assert [token for item in data for token in item["token_ids"]] == out[0, len(prompt) :].tolist()
        for layer, index in ((1, 1), (-1, -1)):
            rows = torch.cat([item[f"hidden.{layer}"] for item in data])
            assert rows.shape == (45, HIDDEN)
            torch.testing.assert_close(rows, states[index][0], atol=1e-5, rtol=1e-4)
        await lose_a_rank(handles[0], client, listener)
        client.detach()
    finally:
        await asyncio.to_thread(end_ar_stages, handles, 2.0)
    assert not handles[0].runtime.path.exists()
    assert not named & set(os.listdir("/dev/shm"))


async def lose_a_rank(handle: ARStageHandle, client: ARStageClient, listener: Listener) -> None:
    """A rank that is killed is the stage's death: every open request fails at once, and the other processes end."""
    family = psutil.Process(handle.pid).children(recursive=True)
    listener.ended.clear()
    long = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    client.submit("long", {"prompt_token_ids": [5, 6, 7]}, long, None, 0, True)
    began = len(listener.outputs)
    while len(listener.outputs) == began:
        await asyncio.sleep(0)
    family[-1].kill()
    await asyncio.wait_for(listener.ended.wait(), 10)
    assert isinstance(listener.errors[-1], StageDeadError)
    _, alive = await asyncio.to_thread(psutil.wait_procs, family, 10)
    assert not alive
