"""A small pipeline with the four verbs, for tests of the engine: real tensors, no weights files, failures on demand.

Its arithmetic is per element and per picture, so that a request gives the same bits alone and in any batch. With two
ranks in the guidance group each step averages over them, in two collectives.

``extra_args`` of a request say what goes wrong::

    {"fail": {"phase": "encode" | "denoise" | "decode" | "check", "kind": "error" | "oom" | "request",
              "rank": 1, "step": 2, "over": 1, "middle": True}}

``rank``: fail on this rank only; ``step``: in this step; ``over``: only in batches of more requests than this;
``middle``: between the two collectives of a step. ``{"gate": path}``: each step waits until the file is there.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.models.common.state import Branches, Conditioning, DenoiseState
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import RequestError

CHANNELS = 3
PATCH = 8


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


class FakePipeline(nn.Module):
    """Pixels are patches of one colour; a step pulls the noise towards the colour of the text."""

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, CHANNELS))
        self.fail: dict[str, dict] = {}
        self.marked: dict[str, torch.Tensor] = {}
        self.batches: list[list[tuple[str, int]]] = []

    def check(self, req: OmniDiffusionRequest) -> OmniDiffusionRequest:
        params = req.sampling_params
        height, width = params.height or 64, params.width or 64
        if height % PATCH or width % PATCH:
            raise RequestError(f"height={height}, width={width}: must be divisible by {PATCH}", field="height")
        self._maybe_fail([params.extra_args.get("fail", {})], "check", 0)
        steps = params.num_inference_steps or 4
        return replace(req, sampling_params=replace(params, height=height, width=width, num_inference_steps=steps))

    def encode(self, req: OmniDiffusionRequest) -> Branches:
        self._maybe_fail([req.sampling_params.extra_args.get("fail", {})], "encode", 0)
        generator = torch.Generator().manual_seed(_seed(req.texts()[0]))
        text = torch.rand(1, 1, CHANNELS, generator=generator) * 2 - 1
        return Branches(Conditioning(text))

    def prepare(self, req: OmniDiffusionRequest, cond: Branches) -> DenoiseState:
        params = req.sampling_params
        rows, columns = params.height // PATCH, params.width // PATCH
        generator = params.generator or torch.Generator().manual_seed(params.seed)
        latents = torch.randn(params.num_outputs_per_prompt, rows * columns, CHANNELS, generator=generator)
        steps = params.num_inference_steps
        request_id = req.request_ids[0]
        self.fail[request_id] = params.extra_args.get("fail", {})
        if "gate" in params.extra_args:
            self.fail[request_id] = {"gate": params.extra_args["gate"]}
        return DenoiseState(
            request_id=request_id,
            latents=latents,
            sigmas=torch.linspace(1, 0, steps + 1),
            timesteps=torch.linspace(1000, 1000 / steps, steps),
            branches=cond,
            grid=(rows, columns),
            size=(params.height, params.width),
            guidance_scale=params.guidance_scale or 1.0,
            seed=params.seed,
        )

    def denoise_step(self, states: Sequence[DenoiseState]) -> None:
        self.batches.append([(state.request_id, state.step_index) for state in states])
        fails = [self.fail.get(state.request_id, {}) for state in states]
        for fail in fails:
            while "gate" in fail and not Path(fail["gate"]).exists():
                time.sleep(0.002)
        step = states[0].step_index
        self._maybe_fail([f for f in fails if not f.get("middle")], "denoise", step, len(states))
        x = torch.cat([state.latents for state in states])
        target = torch.cat([s.branches.positive.text_BTD.expand(len(s.latents), -1, -1) for s in states])
        rate = torch.cat(
            [torch.full((len(s.latents), 1, 1), s.guidance_scale / (s.num_steps - s.step_index)) for s in states]
        )
        x = self._mean(x)
        self._maybe_fail([f for f in fails if f.get("middle")], "denoise", step, len(states))
        x = self._mean(x + (target * self.weight - x) * rate.clamp(max=0.5))
        for state, latents in zip(states, x.split([len(state.latents) for state in states]), strict=True):
            state.latents = latents
            state.step_index += 1
            if self.fail.get(state.request_id, {}).get("phase") == "decode":
                self.marked[state.request_id] = latents
            if state.keep_trajectory:
                state.trajectory.append(latents)

    def decode(self, state: DenoiseState) -> DiffusionOutput:
        # Several requests come as one state, so those that are to fail are known by their latents.
        for request_id, latents in list(self.marked.items()):
            if any(torch.equal(row, latents[0]) for row in state.latents):
                if len(state.latents) == 1:
                    del self.marked[request_id]
                self._maybe_fail([self.fail[request_id]], "decode", 0, len(state.latents))
        rows, columns = state.grid
        pixels = state.latents.transpose(1, 2).unflatten(2, (rows, columns))
        return DiffusionOutput(output=pixels.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).clamp(-1, 1))

    def forward(self, req: OmniDiffusionRequest) -> DiffusionOutput:
        state = self.prepare(req, self.encode(req))
        while not state.done:
            self.denoise_step([state])
        return self.decode(state)

    @staticmethod
    def _mean(x: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_cfg_group()
        return x if group is None else group.all_reduce(x.clone()) / group.world_size

    @staticmethod
    def _maybe_fail(fails: list[dict], phase: str, step: int, batch: int = 1) -> None:
        rank = parallel_state.get_rank()
        for fail in fails:
            if fail.get("phase") != phase or fail.get("rank", rank) != rank or fail.get("step", step) != step:
                continue
            if batch <= fail.get("over", 0):
                continue
            if fail["kind"] == "oom":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB (made up by the test)")
            if fail["kind"] == "request":
                raise RequestError("the model does not take this", field="prompt")
            raise ValueError("made to fail by the test")


class WholePipeline(nn.Module):
    """A pipeline with ``forward`` alone, as an outside author might write it."""

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.inner = FakePipeline(od_config=od_config)

    def forward(self, req: OmniDiffusionRequest) -> DiffusionOutput:
        req = self.inner.check(req)
        out = self.inner.forward(req)
        out.trajectory_timesteps = torch.linspace(1000, 0, 5)
        out.trajectory_latents = torch.zeros(5, 1, 2)
        out.metrics = {"made_by": "WholePipeline"}
        if req.texts()[0] == "report":
            return DiffusionOutput(error="the pipeline reports an error")
        return out


class Extension:
    """Worker extension of the tests."""

    def whoami(self, prefix: str = "") -> str:
        return f"{prefix}{self.rank}"

    def batches(self) -> list:
        return self.model_runner.pipeline.batches

    def held(self) -> list[str]:
        return sorted(self.model_runner._requests)

    def explode(self) -> None:
        raise ValueError("the extension failed")


class Conflicting:
    """An extension whose method the worker already has."""

    def load_model(self) -> None:
        raise AssertionError
