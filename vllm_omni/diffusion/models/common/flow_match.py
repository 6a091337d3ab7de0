"""Flow matching (Lipman et al. 2023; rectified flow): noise levels and the Euler solver.

Symbols: sigma is the noise level (1 pure noise, 0 picture), t = 1000 sigma what the transformer is told, mu the shift
of the schedule towards high noise, linear in the number of latent tokens (Esser et al. 2024, section 5.3.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from vllm_omni.errors import ConfigError


@dataclass(frozen=True)
class FlowSchedule:
    """Noise levels of a request, by the keys of a checkpoint's scheduler_config.json."""

    num_train_timesteps: int = 1000
    """Factor from sigma to timestep."""
    shift: float = 1.0
    """Static shift, when it is not dynamic."""
    use_dynamic_shifting: bool = False
    """Whether the shift grows with the number of latent tokens."""
    base_shift: float = 0.5
    """mu at ``base_image_seq_len`` tokens."""
    max_shift: float = 1.15
    """mu at ``max_image_seq_len`` tokens."""
    base_image_seq_len: int = 256
    """Tokens of a small picture."""
    max_image_seq_len: int = 4096
    """Tokens of a large picture."""
    shift_terminal: float | None = None
    """Noise level that the last step but the end is stretched to."""
    time_shift_type: str = "exponential"
    """``exponential`` or ``linear`` use of mu."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowSchedule:
        """Read a scheduler_config.json.

        Raises:
            ConfigError: another scheduler, or an option of it that is not supported.
        """
        name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise ConfigError(f"scheduler {name!r}: this model runs with FlowMatchEulerDiscreteScheduler alone")
        known = {f.name for f in fields(cls)}
        for key, value in config.items():
            if key not in known and not key.startswith("_") and value not in (None, False):
                raise ConfigError(f"scheduler_config.json: {key}={value!r} is not supported", field="model")
        schedule = cls(**{key: value for key, value in config.items() if key in known})
        if schedule.time_shift_type not in ("exponential", "linear"):
            raise ConfigError(f"scheduler_config.json: time_shift_type={schedule.time_shift_type!r}", field="model")
        return schedule

    def levels(self, steps: int, tokens: int, sigmas: Sequence[float] | None = None) -> torch.Tensor:
        """Noise levels from the first step to the end, float32 [steps + 1] on the CPU; the last is 0.

        Args:
            steps: number of steps.
            tokens: latent tokens of the picture.
            sigmas: levels to shift instead of the even ones from 1 to 1 / steps.
        """
        base = np.linspace(1.0, 1 / steps, steps) if sigmas is None else np.array(sigmas)
        sigma: Any = base.astype(np.float32)
        if not self.use_dynamic_shifting:
            sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        else:
            mu = linear_mu(tokens, self.base_image_seq_len, self.max_image_seq_len, self.base_shift, self.max_shift)
            weight = math.exp(mu) if self.time_shift_type == "exponential" else mu
            sigma = weight / (weight + (1 / sigma - 1))
        rest = 1 - sigma
        # A schedule that never leaves sigma = 1 (one step) cannot be stretched; the reference divides 0 by 0 there.
        if self.shift_terminal and rest[-1] > 0:
            sigma = 1 - rest / (rest[-1] / (1 - self.shift_terminal))
        return torch.cat((torch.from_numpy(sigma).float(), torch.zeros(1)))


def linear_mu(tokens: int, base_tokens: int, max_tokens: int, base_shift: float, max_shift: float) -> float:
    """mu on the line through (base_tokens, base_shift) and (max_tokens, max_shift)."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return tokens * slope + (base_shift - slope * base_tokens)


def clean_estimate(latents: torch.Tensor, velocity: torch.Tensor, sigma: float) -> torch.Tensor:
    """What a model that predicts ``velocity`` at level ``sigma`` takes the clean latents to be: x - sigma v."""
    return torch.add(latents.float(), velocity, alpha=-sigma).to(velocity.dtype)


def euler_step(latents: torch.Tensor, velocity: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """x + (sigma' - sigma) v, computed in float32, in the dtype of ``velocity``."""
    return torch.add(latents.float(), velocity, alpha=sigma_next - sigma).to(velocity.dtype)
