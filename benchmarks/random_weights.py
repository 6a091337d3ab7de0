"""Random weights at which activations stay finite and near one, for engines that were started without a checkpoint.

vLLM's ``load_format="dummy"`` draws from [-0.001, 0.001], norms included: activations are next to nothing then, and a
GPU that multiplies nothing draws less power and runs faster than it would. ``RandomWeights`` is a
``worker_extension_cls``: ``collective_rpc("fill_random_weights")`` draws all parameters anew, in place, so that
captured graphs see them.
"""

from typing import Any

import torch

LIMIT = 0.02
"""Largest standard deviation, that of the initialisation of most language models."""


@torch.inference_mode()
def fill(module: torch.nn.Module, seed: int = 0) -> int:
    """Draw every floating-point parameter of ``module``; norms become one. Returns the number of values."""
    generators: dict[torch.device, torch.Generator] = {}
    count = 0
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            continue
        count += parameter.numel()
        if "norm" in name and not name.endswith("bias"):
            parameter.fill_(1.0)
            continue
        device = parameter.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        parameter.normal_(0.0, _deviation(name, parameter), generator=generators[device])
    return count


def _deviation(name: str, parameter: torch.Tensor) -> float:
    """Standard deviation by fan-in; convolutions sum over two dimensions, experts are a dimension more."""
    if parameter.dim() < 2:
        return LIMIT
    fan_in = parameter.shape[-1] if "expert" in name else parameter[0].numel()
    return float(min(LIMIT, fan_in**-0.5))


class RandomWeights:
    """Worker extension of the engines that are measured."""

    model_runner: Any

    def fill_random_weights(self, seed: int = 0) -> int:
        """Draw the weights of this worker's model; returns their number."""
        return fill(self.model_runner.get_model(), seed)
