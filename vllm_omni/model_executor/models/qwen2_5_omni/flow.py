"""Sampling of token2wav's mel spectrogram: Runge-Kutta over sway-warped times with classifier-free guidance.

The solver is the "3/8 rule" of fourth order. Chen et al., "F5-TTS", 2024 (sway sampling).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_omni.errors import RequestError
from vllm_omni.model_executor.layers.graphed import record
from vllm_omni.model_executor.models.qwen2_5_omni.dit import BlockLayout, CodecDiT

_GUIDED_ABOVE = 1e-5


@dataclass(frozen=True)
class FlowSettings:
    """How a mel spectrogram is sampled."""

    num_steps: int = 10
    """Time points, so ``num_steps - 1`` steps of four evaluations each."""
    guidance_scale: float = 0.5
    """Strength of classifier-free guidance; below 1e-5 the unconditional half is not computed."""
    sway_coefficient: float | None = -1.0
    """Warp of the time points towards the noisy end; ``None`` spaces them evenly."""

    def validate(self) -> None:
        """Check values that came with a request.

        Raises:
            RequestError: names the field and what is allowed.
        """
        sway = self.sway_coefficient
        if not isinstance(self.num_steps, int) or not 2 <= self.num_steps <= 1000:
            raise RequestError(f"num_steps={self.num_steps!r}", field="num_steps", allowed="2 to 1000")
        if not isinstance(self.guidance_scale, int | float) or not 0 <= self.guidance_scale <= 100:
            raise RequestError(f"guidance_scale={self.guidance_scale!r}", field="guidance_scale", allowed="0 to 100")
        if sway is not None and (not isinstance(sway, int | float) or not -1 <= sway <= 1):
            raise RequestError(f"sway_coefficient={sway!r}", field="sway_coefficient", allowed="-1 to 1, or null")

    def times(self) -> torch.Tensor:
        """The time points, [num_steps] from 0 to 1."""
        time = torch.linspace(0, 1, self.num_steps)
        if self.sway_coefficient is not None:
            time = time + self.sway_coefficient * (torch.cos(torch.pi / 2 * time) - 1 + time)
        return time


@dataclass
class FlowInput:
    """One request of a batch, F frames."""

    condition_FC: torch.Tensor
    """Rows added to every frame, with voice and codes."""
    plain_FC: torch.Tensor
    """The same without voice and codes."""
    noise_FM: torch.Tensor
    """Initial noise."""


class GraphedFlow:
    """``CodecDiT`` as CUDA graphs, one for each of a few numbers of blocks; other numbers, and a CPU, run it as it is.

    ``begin`` sets what stays the same over the evaluations of a sampling. Blocks that fill up to a captured number see
    none but themselves.
    """

    def __init__(self, dit: CodecDiT) -> None:
        self._dit = dit
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, _Buffers, torch.Tensor]] = {}
        self._current: int | None = None

    @property
    def sizes(self) -> list[int]:
        """Captured numbers of blocks, in order."""
        return sorted(self._captured)

    def capture(self, sizes: Sequence[int]) -> None:
        """Capture a graph for each number of blocks."""
        pool = None
        for size in sorted(sizes, reverse=True):
            buffers = _Buffers.make(self._dit, size)
            graph, out = record(functools.partial(buffers.run, self._dit), pool)
            pool = graph.pool()
            self._captured[size] = graph, buffers, out

    def begin(self, condition: torch.Tensor, layout: BlockLayout) -> None:
        """Prepare for evaluations with this condition and layout."""
        blocks = condition.shape[0]
        self._current = next((size for size in self.sizes if blocks <= size <= 2 * blocks + 8), None)
        if self._current is not None:
            self._captured[self._current][1].begin(condition, layout)

    def __call__(
        self, x: torch.Tensor, condition: torch.Tensor, modulation: torch.Tensor, layout: BlockLayout
    ) -> torch.Tensor:
        """One evaluation; ``modulation`` is the joined row of all tables."""
        if self._current is None:
            return self._dit(x, condition, _parts(self._dit, modulation), layout)
        graph, buffers, out = self._captured[self._current]
        buffers.x[: x.shape[0]].copy_(x)
        buffers.modulation.copy_(modulation)
        graph.replay()
        return out[: x.shape[0]].clone()


@dataclass
class _Buffers:
    """What a captured evaluation reads."""

    x: torch.Tensor
    condition: torch.Tensor
    modulation: torch.Tensor
    layout: BlockLayout

    @classmethod
    def make(cls, dit: CodecDiT, blocks: int) -> _Buffers:
        """Buffers of ``blocks`` blocks, each alone."""
        config, weight = dit.config, dit.proj_out.weight
        alone = dit.layout([config.block_size] * blocks)
        alone.padded = True
        width = 2 * config.hidden_size + 6 * config.hidden_size * config.num_hidden_layers
        return cls(
            weight.new_zeros(blocks, config.block_size, config.mel_dim),
            weight.new_zeros(blocks, config.block_size, config.hidden_size),
            weight.new_zeros(width),
            alone,
        )

    def begin(self, condition: torch.Tensor, layout: BlockLayout) -> None:
        """Copy what stays; the blocks behind it become blocks that are alone."""
        count, mine = condition.shape[0], self.layout
        self.condition[:count].copy_(condition)
        for name in ("cos", "sin", "valid", "back", "ahead"):
            getattr(mine, name)[:count].copy_(getattr(layout, name))
        mine.valid[count:] = True
        mine.back[count:] = False
        mine.ahead[count:] = False

    def run(self, dit: CodecDiT) -> torch.Tensor:
        """The evaluation."""
        return dit(self.x, self.condition, _parts(dit, self.modulation), self.layout)


def _parts(dit: CodecDiT, modulation: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """A joined row of modulations as ``CodecDiT`` takes it."""
    sizes = [6 * dit.config.hidden_size] * dit.config.num_hidden_layers + [2 * dit.config.hidden_size]
    *layers, out = modulation.split(sizes)
    return layers, out


class MelSampler:
    """Runs the flow for batches of requests; keeps the modulation tables of each set of time points.

    Build a new one when the weights of ``dit`` change.
    """

    def __init__(self, dit: CodecDiT) -> None:
        self.dit = dit
        self.graphs = GraphedFlow(dit)
        self._tables: dict[FlowSettings, torch.Tensor] = {}

    def _modulation(self, settings: FlowSettings, evaluation: int) -> torch.Tensor:
        if settings not in self._tables:
            device = self.dit.proj_out.weight.device
            layers, out = self.dit.modulations(_evaluation_times(settings.times()).to(device))
            self._tables[settings] = torch.cat([*layers, out], dim=1)
        return self._tables[settings][evaluation]

    def sample(self, batch: Sequence[FlowInput], settings: FlowSettings) -> list[torch.Tensor]:
        """Mel spectrogram [F, mel_dim] of each request."""
        frames = [item.noise_FM.shape[0] for item in batch]
        guided = settings.guidance_scale >= _GUIDED_ABOVE
        x = self._pack([item.noise_FM for item in batch])
        condition = self._pack([item.condition_FC for item in batch])
        layout = self.dit.layout(frames * 2 if guided else frames)
        if guided:
            condition = torch.cat([condition, self._pack([item.plain_FC for item in batch])])
        self.graphs.begin(condition, layout)
        times = settings.times().tolist()
        for step in range(settings.num_steps - 1):
            x = self._step(x, condition, layout, settings, step, times[step + 1] - times[step])
        return self._unpack(x, frames)

    def _step(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        layout: BlockLayout,
        settings: FlowSettings,
        step: int,
        size: float,
    ) -> torch.Tensor:
        def velocity(part: int, value: torch.Tensor) -> torch.Tensor:
            return self._velocity(value, condition, layout, settings, 4 * step + part)

        k1 = velocity(0, x)
        k2 = velocity(1, x + size / 3 * k1)
        k3 = velocity(2, x + size * (k2 - k1 / 3))
        k4 = velocity(3, x + size * (k1 - k2 + k3))
        return x + (k1 + 3 * (k2 + k3) + k4) * (size / 8)

    def _velocity(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        layout: BlockLayout,
        settings: FlowSettings,
        evaluation: int,
    ) -> torch.Tensor:
        modulation = self._modulation(settings, evaluation)
        if settings.guidance_scale < _GUIDED_ABOVE:
            return self.graphs(x, condition, modulation, layout)
        with_voice, without = self.graphs(torch.cat([x, x]), condition, modulation, layout).chunk(2)
        return with_voice + (with_voice - without) * settings.guidance_scale

    def _pack(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rows [F_i, C] of each request -> blocks [N, S, C]."""
        size = self.dit.config.block_size
        padded = [torch.nn.functional.pad(row, (0, 0, 0, -row.shape[0] % size)) for row in rows]
        return torch.cat(padded).view(-1, size, rows[0].shape[1])

    def _unpack(self, blocks: torch.Tensor, frames: Sequence[int]) -> list[torch.Tensor]:
        size, rows = self.dit.config.block_size, blocks.flatten(0, 1)
        out, start = [], 0
        for count in frames:
            out.append(rows[start : start + count])
            start += -(-count // size) * size
        return out


def _evaluation_times(times: torch.Tensor) -> torch.Tensor:
    """The four times of each step, flattened."""
    start, size = times[:-1], times[1:] - times[:-1]
    return torch.stack([start, start + size * (1 / 3), start + size * (2 / 3), times[1:]], dim=1).flatten()
