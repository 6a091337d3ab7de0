"""The activation of waveform decoders."""

import torch
from torch import nn


class SnakeBeta(nn.Module):
    """x + sin(exp(alpha) x)^2 / exp(beta) per channel of [B, C, T] (Liu et al. 2020, arXiv 2006.08195).

    ``fused``: as one kernel, on a GPU.
    """

    fused = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        if self.fused:
            from vllm_omni.model_executor.layers.snake_kernel import snake_beta

            return snake_beta(x_BCT, self.alpha, self.beta)
        gain = (self.beta.exp() + 1e-9).reciprocal()[:, None]
        # In place: at 24 kHz every pass over the tensor counts.
        return torch.addcmul(x_BCT, (x_BCT * self.alpha.exp()[:, None]).sin_().square_(), gain)


def fuse_snakes(module: nn.Module) -> str | None:
    """Run every ``SnakeBeta`` of ``module`` as a kernel; if that does not work on this machine, say why."""
    from vllm_omni.model_executor.layers import snake_kernel

    snakes = [part for part in module.modules() if isinstance(part, SnakeBeta)]
    first = snakes[0]
    x = torch.linspace(-3, 3, 1000, device=first.alpha.device).to(first.alpha.dtype).repeat(1, len(first.alpha), 1)
    wrong = snake_kernel.check(lambda: snake_kernel.snake_beta(x, first.alpha, first.beta), first(x))
    for part in snakes:
        part.fused = wrong is None
    return wrong
