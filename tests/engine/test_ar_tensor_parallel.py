"""Two tensor-parallel ranks give what one gives; payloads reach both and leave once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from vllm.sampling_params import SamplingParams

from tests.ar_models import HIDDEN, save_lm
from tests.ar_support import SMALL
from vllm_omni.distributed.omni_connectors.utils.arena import Arena
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec, resolve
from vllm_omni.engine.ar_launch import ARStageSpec, end_ar_stages, launch_ar_stages
from vllm_omni.engine.ar_stage_client import ARStageClient
from vllm_omni.engine.stage_seam import StageOutput
from vllm_omni.errors import OmniError, StageDeadError


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
        client.detach()
    finally:
        await asyncio.to_thread(end_ar_stages, handles, 2.0)
