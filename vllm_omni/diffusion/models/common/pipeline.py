"""The diffusion pipeline, written once.

A family brings tables (defaults, schedule, guidance, components) and two small verbs, ``encode_prompts`` and
``decode_latents``. Everything else is here and final: checking, noise, the step over a batch of requests, guidance on
one rank or two, the loop, and ``forward`` for one whole request.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, final

import torch
from torch import nn

from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.models.common.batching import BranchName, modulation_row, stack_texts
from vllm_omni.diffusion.models.common.components import Component, load_component
from vllm_omni.diffusion.models.common.flow_match import FlowSchedule, clean_estimate, euler_step
from vllm_omni.diffusion.models.common.latents import draw_noise, pack_2x2, unpack_2x2
from vllm_omni.diffusion.models.common.preview import LatentToColour, crop, preview_steps
from vllm_omni.diffusion.models.common.sampling import (
    MOST_PICTURES,
    SamplingDefaults,
    check_pixels,
    resolve_request,
    with_overrides,
)
from vllm_omni.diffusion.models.common.state import Branches, Conditioning, DenoiseState
from vllm_omni.diffusion.models.common.transformer import DiTInputs, DiTModel
from vllm_omni.diffusion.models.common.weights import ComponentSource
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.utils.checkpoint import model_folder, read_config
from vllm_omni.errors import RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams


class DiTPipeline(nn.Module, CFGParallelMixin, ABC):
    """Base of the package's pipelines.

    Args:
        od_config: configuration of the stage.
        prefix: put before the names of weights; empty for a whole pipeline.
    """

    components: ClassVar[tuple[Component, ...]]
    """Parts with weights, the transformer among them."""
    cfg_batch_tokens: ClassVar[int] = 2048
    """Up to so many latent tokens in the batch both branches share one forward; above, the GPU is full with one."""

    transformer: DiTModel
    vae: Any
    defaults: SamplingDefaults
    vae_scale: int
    """Pixels a latent along each side."""

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.od_config = od_config
        self.device = get_local_device()
        self.dtype = od_config.torch_dtype
        self.folder = model_folder(od_config.model, od_config.revision)
        self.colours = LatentToColour()
        self.schedule = FlowSchedule.from_config(read_config(self.folder, "scheduler", "scheduler_config.json"))
        self.weights_sources = [
            ComponentSource(str(self.folder), component.name, None, f"{prefix}{component.name}.")
            for component in self.components
        ]

    @abstractmethod
    def encode_prompts(self, texts: Sequence[str], params: OmniDiffusionSamplingParams) -> Conditioning:
        """Conditioning of ``texts``, one row each."""

    @abstractmethod
    def decode_latents(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Unpacked latents to pictures, [B, 3, H, W] in [-1, 1]."""

    @abstractmethod
    def combine(self, positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        """Classifier-free guidance: one prediction of two."""

    @property
    def max_pixels(self) -> int:
        """Pixels of one picture at most."""
        own = MOST_PICTURES * self.defaults.height * self.defaults.width
        return own if self.od_config.max_pixels is None else self.od_config.max_pixels

    @final
    def check(self, req: OmniDiffusionRequest) -> OmniDiffusionRequest:
        """``req`` with defaults filled in and a seed drawn where none is given; touches no device.

        Raises:
            RequestError: names the field, its value and what is allowed.
        """
        req = resolve_request(req, self.defaults, type(self).__name__, self.od_config.default_seed)
        params = req.sampling_params
        check_pixels(params, self.max_pixels)
        rows = len(req.prompts) * params.num_outputs_per_prompt
        if params.latents is not None:
            grid = self._grid(params)
            wanted = [rows, grid[0] * grid[1], self.transformer.in_channels]
            if list(params.latents.shape) != wanted:
                raise RequestError(
                    f"latents of shape {list(params.latents.shape)}: expected {wanted}", field="latents", allowed=wanted
                )
        if isinstance(params.generator, list) and len(params.generator) not in (1, rows):
            raise RequestError(
                f"generator has {len(params.generator)} entries for {rows} pictures", field="generator", allowed=rows
            )
        if params.generator_device == "cuda" and not torch.cuda.is_available():
            raise RequestError("generator_device='cuda': there is no GPU; use 'cpu'", field="generator_device")
        return req

    @final
    @torch.no_grad()
    def encode(self, req: OmniDiffusionRequest) -> Branches:
        """Text encoders, for the positive branch and, with guidance, the negative one."""
        params = req.sampling_params
        copies = params.num_outputs_per_prompt
        positive = self.encode_prompts(req.texts(), params).repeat(copies)
        negative_texts = [text for text in req.negative_texts() if text is not None]
        if not negative_texts or params.true_cfg_scale is None or params.true_cfg_scale <= 1:
            return Branches(positive)
        return Branches(positive, self.encode_prompts(negative_texts, params).repeat(copies))

    @final
    @torch.no_grad()
    def prepare(self, req: OmniDiffusionRequest, cond: Branches) -> DenoiseState:
        """Initial noise and schedule. ``req`` has been through ``check``."""
        params = req.sampling_params
        grid = self._grid(params)
        assert params.height is not None
        assert params.width is not None
        assert params.num_inference_steps is not None
        sigmas = self.schedule.levels(params.num_inference_steps, grid[0] * grid[1], params.sigmas)
        return DenoiseState(
            request_id=req.request_ids[0] if req.request_ids else "",
            latents=self._initial_latents(params, grid, cond.positive.text_BTD.shape[0]),
            sigmas=sigmas,
            timesteps=sigmas[:-1] * self.schedule.num_train_timesteps,
            branches=cond,
            grid=grid,
            size=(params.height, params.width),
            guidance_scale=params.guidance_scale if self.defaults.guidance_scale is not None else None,
            cfg_scale=1.0 if params.true_cfg_scale is None else params.true_cfg_scale,
            prompt_tokens=None
            if cond.positive.counts is None
            else sum(cond.positive.counts[:: params.num_outputs_per_prompt]),
            seed=params.seed,
            keep_trajectory=params.return_trajectory_latents,
            preview_steps=preview_steps(params.num_previews, params.num_inference_steps),
            output_type=params.output_type,
        )

    @final
    @torch.no_grad()
    def denoise_step(self, states: Sequence[DenoiseState]) -> None:
        """One step of every state in one forward (two, where guidance is not batched)."""
        velocity = self._velocity(states)
        rows = [state.latents.shape[0] for state in states]
        for state, mine in zip(states, velocity.split(rows), strict=True):
            i = state.step_index
            if i + 1 in state.preview_steps:
                state.foreseen = clean_estimate(state.latents, mine, float(state.sigmas[i]))
            state.latents = euler_step(state.latents, mine, float(state.sigmas[i]), float(state.sigmas[i + 1]))
            state.step_index = i + 1
            if state.keep_trajectory:
                state.trajectory.append(state.latents)
            if state.done:
                state.scratch.clear()

    @final
    def denoise(self, state: DenoiseState) -> Iterator[DenoiseState]:
        """The loop of one request; yields the state after every step."""
        while not state.done:
            self.denoise_step([state])
            yield state

    def diffuse(self, state: DenoiseState) -> DenoiseState:
        """``denoise`` to its end."""
        for _ in self.denoise(state):
            pass
        return state

    @final
    @torch.no_grad()
    def decode(self, state: DenoiseState) -> DiffusionOutput:
        """Latents to pictures, [B, 3, H, W] in [-1, 1]; packed latents for ``output_type="latent"``."""
        output = state.latents
        if state.output_type != "latent":
            latents_BCHW = unpack_2x2(state.latents, state.grid)
            output = self.decode_latents(latents_BCHW)
            if state.preview_steps:
                self.colours.learn(latents_BCHW, output)
        return DiffusionOutput(
            output=output,
            trajectory_timesteps=state.timesteps[: len(state.trajectory)] if state.keep_trajectory else None,
            trajectory_latents=torch.stack(state.trajectory) if state.trajectory else None,
            metrics={"seed": state.seed, "num_inference_steps": state.num_steps, **state.token_counts()},
        )

    @final
    @torch.no_grad()
    def preview(self, state: DenoiseState) -> torch.Tensor | None:
        """What the last step foresaw, as small pictures [B, 3, h, w] in [-1, 1]; None when none was asked for then."""
        if state.foreseen is None:
            return None
        latents_BCHW, state.foreseen = unpack_2x2(state.foreseen, state.grid), None
        if self.colours.wants(state.step_index, state.num_steps, state.preview_steps):
            lesson_BCHW = crop(latents_BCHW)
            self.colours.learn(lesson_BCHW, self.decode_latents(lesson_BCHW))
        return self.colours.render(latents_BCHW)

    def forward(
        self, req: OmniDiffusionRequest, prompt: Any = None, negative_prompt: Any = None, **overrides: Any
    ) -> DiffusionOutput:
        """One request from text to pictures.

        Args:
            req: prompts and sampling parameters.
            prompt: text(s) in place of those of ``req``.
            negative_prompt: negative text(s) in place of those of ``req``.
            overrides: sampling parameters in place of those of ``req``.

        Raises:
            RequestError: bad input.
        """
        req = self.check(with_overrides(req, prompt, negative_prompt, overrides))
        return self.decode(self.diffuse(self.prepare(req, self.encode(req))))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Put the tensors of ``weights_sources`` into their components; returns the names of the parameters.

        Raises:
            ConfigError: lists the names that do not fit.
        """
        by_name = {component.name: component for component in self.components}
        loaded: set[str] = set()
        for name, group in itertools.groupby(weights, key=lambda item: item[0].split(".", 1)[0]):
            module = self.get_submodule(name)
            tensors = ((full_name.split(".", 1)[1], tensor) for full_name, tensor in group)
            if isinstance(module, DiTModel):
                names = module.load_weights(tensors)
            else:
                names = load_component(module, tensors, by_name[name], type(self).__name__)
            loaded |= {f"{name}.{inner}" for inner in names}
        return loaded

    def _grid(self, params: OmniDiffusionSamplingParams) -> tuple[int, int]:
        assert params.height is not None
        assert params.width is not None
        return params.height // (2 * self.vae_scale), params.width // (2 * self.vae_scale)

    def _initial_latents(self, params: OmniDiffusionSamplingParams, grid: tuple[int, int], rows: int) -> torch.Tensor:
        if params.latents is not None:
            return params.latents.to(self.device, self.dtype)
        generators = params.generator
        if generators is None:
            assert params.seed is not None
            generators = torch.Generator(params.generator_device).manual_seed(params.seed)
        if isinstance(generators, torch.Generator):
            generators = [generators]
        shape = (rows, self.transformer.in_channels // 4, 2 * grid[0], 2 * grid[1])
        return pack_2x2(draw_noise(shape, generators, self.dtype, self.device))

    def _velocity(self, states: Sequence[DenoiseState]) -> torch.Tensor:
        """Prediction for all states, guidance applied, [rows of all states, S, C]."""
        if states[0].branches.negative is None:
            return self._predict(states, ("positive",))
        mine = self.my_branch()
        tokens = sum(state.latents.shape[0] * state.latents.shape[1] for state in states)
        if mine is not None:
            positive, negative = self.gather_branches(self._predict(states, (mine,)))
        elif tokens <= self.cfg_batch_tokens:
            positive, negative = self._predict(states, ("positive", "negative")).chunk(2)
        else:
            positive, negative = self._predict(states, ("positive",)), self._predict(states, ("negative",))
        rows = [state.latents.shape[0] for state in states]
        guided = [
            self.combine(p, n, state.cfg_scale)
            for p, n, state in zip(positive.split(rows), negative.split(rows), states, strict=True)
        ]
        return guided[0] if len(guided) == 1 else torch.cat(guided)

    def _predict(self, states: Sequence[DenoiseState], branches: Sequence[BranchName]) -> torch.Tensor:
        """One forward: every state under each of ``branches``, branch by branch."""
        latents = [state.latents for state in states] * len(branches)
        conditions = [state.branches.get(branch) for branch in branches for state in states]
        text_BTD, text_lengths = stack_texts(conditions)
        rows = [modulation_row(self.transformer, state, branch) for branch in branches for state in states]
        shared = all(row is rows[0] for row in rows) and rows[0].shape[0] == 1
        if len(rows) == 1 or shared:
            modulation_BM = rows[0]
        else:
            modulation_BM = torch.cat([row.expand(len(x), -1) for row, x in zip(rows, latents, strict=True)])
        out: torch.Tensor = self.transformer(
            DiTInputs(
                latents_BSC=latents[0] if len(latents) == 1 else torch.cat(latents),
                text_BTD=text_BTD,
                modulation_BM=modulation_BM,
                grid=states[0].grid,
                text_lengths=text_lengths,
            )
        )
        return out
