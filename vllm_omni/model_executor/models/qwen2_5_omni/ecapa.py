"""Reference encoder of token2wav: an ECAPA-TDNN that turns the mel spectrogram of a voice into one vector.

Desplanques et al., "ECAPA-TDNN", 2020. Module names are those of the checkpoint
(``token2wav.code2wav_dit_model.input_embed.spk_encoder``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_EPS = 1e-12


def _conv(channels_in: int, channels_out: int, kernel: int = 1, dilation: int = 1) -> nn.Conv1d:
    return nn.Conv1d(channels_in, channels_out, kernel, dilation=dilation, padding="same", padding_mode="reflect")


class TimeDelay(nn.Module):
    """Dilated convolution and ReLU on [B, C, T]."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = _conv(channels_in, channels_out, kernel, dilation)

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        return self.conv(x_BCT).relu_()


class Res2Net(nn.Module):
    """Channel groups in a cascade: group ``i`` is convolved after the result of group ``i - 1`` was added to it."""

    def __init__(self, channels: int, scale: int, kernel: int, dilation: int) -> None:
        super().__init__()
        width = channels // scale
        self.blocks = nn.ModuleList(TimeDelay(width, width, kernel, dilation) for _ in range(scale - 1))
        self.scale = scale

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        first, *groups = x_BCT.chunk(self.scale, dim=1)
        outs = [first]
        for i, (block, group) in enumerate(zip(self.blocks, groups, strict=True)):
            outs.append(block(group if i == 0 else group + outs[-1]))
        return torch.cat(outs, dim=1)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from the mean over time."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, hidden)
        self.conv2 = _conv(hidden, channels)

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        return x_BCT * self.conv2(self.conv1(x_BCT.mean(2, keepdim=True)).relu()).sigmoid()


class SERes2Net(nn.Module):
    """TDNN - Res2Net - TDNN - squeeze-excitation with a residual path."""

    def __init__(self, channels: int, scale: int, se_channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.tdnn1 = TimeDelay(channels, channels)
        self.res2net_block = Res2Net(channels, scale, kernel, dilation)
        self.tdnn2 = TimeDelay(channels, channels)
        self.se_block = SqueezeExcitation(channels, se_channels)

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        return x_BCT + self.se_block(self.tdnn2(self.res2net_block(self.tdnn1(x_BCT))))


class AttentivePooling(nn.Module):
    """Mean and standard deviation over time with learnt weights: [B, C, T] -> [B, 2C, 1]."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.tdnn = TimeDelay(channels * 3, hidden)
        self.conv = _conv(hidden, channels)

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        mean, std = _statistics(x_BCT, torch.full_like(x_BCT[:, :1], 1 / x_BCT.shape[2]))
        context = torch.cat([x_BCT, mean.expand_as(x_BCT), std.expand_as(x_BCT)], dim=1)
        weights = self.conv(self.tdnn(context).tanh()).softmax(dim=2)
        return torch.cat(_statistics(x_BCT, weights), dim=1)


def _statistics(x_BCT: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = (weights * x_BCT).sum(2, keepdim=True)
    variance = (weights * (x_BCT - mean).square()).sum(2, keepdim=True)
    return mean, variance.clamp(_EPS).sqrt()


class ReferenceEncoder(nn.Module):
    """Mel spectrogram [B, M, mel_dim] of a voice -> vector [B, enc_dim]; ``config`` is the DiT's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        widths, kernels, dilations = config.enc_channels, config.enc_kernel_sizes, config.enc_dilations
        blocks: list[nn.Module] = [TimeDelay(config.mel_dim, widths[0], kernels[0], dilations[0])]
        for i in range(1, len(widths) - 1):
            blocks.append(
                SERes2Net(widths[i], config.enc_res2net_scale, config.enc_se_channels, kernels[i], dilations[i])
            )
        self.blocks = nn.ModuleList(blocks)
        self.mfa = TimeDelay(widths[-1], widths[-1], kernels[-1], dilations[-1])
        self.asp = AttentivePooling(widths[-1], config.enc_attention_channels)
        self.fc = _conv(widths[-1] * 2, config.enc_dim)

    def forward(self, mel_BMC: torch.Tensor) -> torch.Tensor:
        x_BCT = mel_BMC.transpose(1, 2)
        features = []
        for block in self.blocks:
            x_BCT = block(x_BCT)
            features.append(x_BCT)
        return self.fc(self.asp(self.mfa(torch.cat(features[1:], dim=1)))).squeeze(-1)
