"""The activation of waveform decoders."""

import torch
from torch import nn


class SnakeBeta(nn.Module):
    """x + sin(exp(alpha) x)^2 / exp(beta) per channel of [B, C, T] (Liu et al. 2020, arXiv 2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        gain = (self.beta.exp() + 1e-9).reciprocal()[:, None]
        # In place: at 24 kHz every pass over the tensor counts.
        return torch.addcmul(x_BCT, (x_BCT * self.alpha.exp()[:, None]).sin_().square_(), gain)
