"""Sampling of token2wav's mel spectrogram: Runge-Kutta over sway-warped times with classifier-free guidance.

The solver is the "3/8 rule" of fourth order. Chen et al., "F5-TTS", 2024 (sway sampling).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vllm_omni.errors import RequestError
from vllm_omni.model_executor.layers.graphed import record
from vllm_omni.model_executor.models.qwen2_5_omni.dit import BlockLayout, CodecDiT

_GUIDED_ABOVE = 1e-5
_KEPT_SETTINGS = 4
_KEPT_STEPS = 32
"""Tables of the most recent settings of at most so many steps are kept; a step takes 2 MB in the released size."""


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
            raise RequestError(
                f"num_steps={self.num_steps!r}: allowed are 2 to 1000", field="num_steps", allowed="2 to 1000"
            )
        if not isinstance(self.guidance_scale, int | float) or not 0 <= self.guidance_scale <= 100:
            raise RequestError(
                f"guidance_scale={self.guidance_scale!r}: allowed is 0 to 100",
                field="guidance_scale",
                allowed="0 to 100",
            )
        if sway is not None and (not isinstance(sway, int | float) or not -1 <= sway <= 1):
            raise RequestError(
                f"sway_coefficient={sway!r}: allowed is -1 to 1, or null",
                field="sway_coefficient",
                allowed="-1 to 1, or null",
            )

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


@dataclass
class _Fixed:
    """What stays the same over the steps of a sampling, for n blocks."""

    condition: torch.Tensor
    """[2n, S, C], with voice and codes and then without; [n, S, C] where nothing is guided."""
    layout: BlockLayout
    """Of the blocks of ``condition``."""
    guidance: torch.Tensor
    """One more than the guidance scale, without dimensions."""


def _step(
    dit: CodecDiT, x_NSM: torch.Tensor, fixed: _Fixed, modulation_4W: torch.Tensor, size: torch.Tensor
) -> torch.Tensor:
    """One step of length ``size`` (without dimensions); a row of ``modulation`` is a row of every table, joined."""
    sizes = [6 * dit.config.hidden_size] * dit.config.num_hidden_layers + [2 * dit.config.hidden_size]

    def velocity(evaluation: int, value: torch.Tensor) -> torch.Tensor:
        *layers, out = modulation_4W[evaluation].split(sizes)
        found = dit(value, fixed.condition, (layers, out), fixed.layout)
        if len(found) == len(value):
            return found
        with_voice, without = found.chunk(2)
        return torch.lerp(without, with_voice, fixed.guidance)

    k1 = velocity(0, x_NSM)
    k2 = velocity(1, torch.addcmul(x_NSM, k1, size / 3))
    k3 = velocity(2, torch.addcmul(x_NSM, k2 - k1 / 3, size))
    k4 = velocity(3, torch.addcmul(x_NSM, k1 - k2 + k3, size))
    return torch.addcmul(x_NSM, k1 + 3 * (k2 + k3) + k4, size / 8)


class _CapturedStep:
    """One step of a guided sampling of up to ``blocks`` blocks as a CUDA graph that works on buffers.

    Blocks that fill up to ``blocks`` see none but themselves.
    """

    def __init__(self, dit: CodecDiT, blocks: int, pool: Any) -> None:
        config, weight = dit.config, dit.proj_out.weight
        frames = config.block_size
        self.x = weight.new_zeros(blocks, frames, config.mel_dim)
        self.layout = dit.layout([frames] * 2 * blocks)
        self.layout.padded = True
        self._alone = torch.tensor([0, frames, 0], dtype=torch.int32, device=weight.device)
        condition = weight.new_zeros(2 * blocks, frames, config.hidden_size)
        self.fixed = _Fixed(condition, self.layout, weight.new_ones(()))
        self.modulation = weight.new_zeros(4, config.hidden_size * (6 * config.num_hidden_layers + 2))
        self.size = weight.new_zeros(())
        self.graph, _ = record(lambda: self.x.copy_(_step(dit, self.x, self.fixed, self.modulation, self.size)), pool)

    def begin(self, x: torch.Tensor, fixed: _Fixed) -> None:
        """Copy what a sampling starts from."""
        count, most, mine = len(x), len(self.x), self.layout
        self.x[:count].copy_(x)
        self.fixed.guidance.copy_(fixed.guidance)
        halves = fixed.condition.chunk(2) if len(fixed.condition) > count else (fixed.condition, fixed.condition)
        for start, condition in zip((0, most), halves, strict=True):
            part = slice(start, start + count)
            self.fixed.condition[part].copy_(condition)
            for name in ("cos", "sin", "frames"):
                getattr(mine, name)[part].copy_(getattr(fixed.layout, name)[:count])
            mine.frames[start + count : start + most] = self._alone

    def __call__(self, modulation_4W: torch.Tensor, size: torch.Tensor) -> None:
        """One step of ``x``."""
        self.modulation.copy_(modulation_4W)
        self.size.copy_(size)
        self.graph.replay()


class MelSampler:
    """Runs the flow for batches of requests; keeps the modulation tables of a few sets of time points.

    Build a new one when the weights of ``dit`` change.
    """

    def __init__(self, dit: CodecDiT) -> None:
        self.dit = dit
        self._captured: dict[int, _CapturedStep] = {}
        self._tables: dict[FlowSettings, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def sizes(self) -> list[int]:
        """Captured numbers of blocks, in order."""
        return sorted(self._captured)

    def capture(self, sizes: Sequence[int]) -> None:
        """Capture a step for each number of blocks of a batch; other numbers, and a CPU, run it as it is."""
        pool = None
        for blocks in sorted(sizes, reverse=True):  # the largest first: the others fit into its memory
            self._captured[blocks] = _CapturedStep(self.dit, blocks, pool)
            pool = self._captured[blocks].graph.pool()

    def sample(self, batch: Sequence[FlowInput], settings: FlowSettings) -> list[torch.Tensor]:
        """Mel spectrogram [F, mel_dim] of each request."""
        frames = [item.noise_FM.shape[0] for item in batch]
        guided = settings.guidance_scale >= _GUIDED_ABOVE
        x = self._pack([item.noise_FM for item in batch])
        condition = self._pack([item.condition_FC for item in batch])
        if guided:
            condition = torch.cat([condition, self._pack([item.plain_FC for item in batch])])
        layout = self.dit.layout(frames * 2 if guided else frames)
        fixed = _Fixed(condition, layout, x.new_tensor(1.0 + settings.guidance_scale * guided))
        captured = next((self._captured[n] for n in self.sizes if len(x) <= n <= 2 * len(x) + 4), None)
        if captured is not None:
            captured.begin(x, fixed)
        for modulation, size in self._steps(settings):
            if captured is None:
                x = _step(self.dit, x, fixed, modulation, size)
            else:
                captured(modulation, size)
        if captured is not None:
            x = captured.x[: len(x)].clone()
        return self._unpack(x, frames)

    def _steps(self, settings: FlowSettings) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Modulation rows [4, W] and length of each step."""
        known = self._tables.pop(settings, None)
        if known is None:
            if settings.num_steps > _KEPT_STEPS:
                yield from (
                    step
                    for times in itertools.pairwise(settings.times())
                    for step in zip(*self._table(torch.stack(times)), strict=True)
                )
                return
            known = self._table(settings.times())
        while len(self._tables) >= _KEPT_SETTINGS:
            del self._tables[next(iter(self._tables))]
        self._tables[settings] = known  # the last one is the most recent
        yield from zip(*known, strict=True)

    def _table(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Modulation rows [steps, 4, W] and lengths [steps] of the steps between ``times``."""
        start, size = times[:-1], times[1:] - times[:-1]
        four = torch.stack([start, start + size * (1 / 3), start + size * (2 / 3), times[1:]], dim=1)
        device = self.dit.proj_out.weight.device
        layers, out = self.dit.modulations(four.flatten().to(device))
        return torch.cat([*layers, out], dim=1).unflatten(0, (-1, 4)), size.to(device)

    def _pack(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rows [F_i, C] of each request -> blocks [N, S, C]."""
        size = self.dit.config.block_size
        padded = [F.pad(row, (0, 0, 0, -row.shape[0] % size)) for row in rows]
        return torch.cat(padded).view(-1, size, rows[0].shape[1])

    def _unpack(self, blocks: torch.Tensor, frames: Sequence[int]) -> list[torch.Tensor]:
        size, rows = self.dit.config.block_size, blocks.flatten(0, 1)
        out, start = [], 0
        for count in frames:
            out.append(rows[start : start + count])
            start += -(-count // size) * size
        return out
