"""Sampling of token2wav's mel spectrogram: Runge-Kutta over sway-warped times with classifier-free guidance.

The solver is the "3/8 rule" of fourth order. Chen et al., "F5-TTS", 2024 (sway sampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_omni.errors import RequestError
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


class MelSampler:
    """Runs the flow for batches of requests; keeps the modulation tables of each set of time points.

    Build a new one when the weights of ``dit`` change.
    """

    def __init__(self, dit: CodecDiT) -> None:
        self.dit = dit
        self._tables: dict[FlowSettings, tuple[list[torch.Tensor], torch.Tensor]] = {}

    def _modulation(self, settings: FlowSettings, evaluation: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        if settings not in self._tables:
            device = self.dit.proj_out.weight.device
            self._tables[settings] = self.dit.modulations(_evaluation_times(settings.times()).to(device))
        layers, out = self._tables[settings]
        return [table[evaluation] for table in layers], out[evaluation]

    def sample(self, batch: Sequence[FlowInput], settings: FlowSettings) -> list[torch.Tensor]:
        """Mel spectrogram [F, mel_dim] of each request."""
        frames = [item.noise_FM.shape[0] for item in batch]
        guided = settings.guidance_scale >= _GUIDED_ABOVE
        x = self._pack([item.noise_FM for item in batch])
        condition = self._pack([item.condition_FC for item in batch])
        layout = self.dit.layout(frames * 2 if guided else frames)
        if guided:
            condition = torch.cat([condition, self._pack([item.plain_FC for item in batch])])
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
            return self.dit(x, condition, modulation, layout)
        with_voice, without = self.dit(torch.cat([x, x]), condition, modulation, layout).chunk(2)
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
