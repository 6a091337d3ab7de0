"""Vocoder of token2wav: BigVGAN, mel spectrogram -> 24 kHz waveform.

Lee et al., "BigVGAN", 2023: transposed convolutions, and residual blocks whose SnakeBeta activations run at twice the
rate between two anti-aliasing filters. Module names are those of the checkpoint
(``token2wav.code2wav_bigvgan_model``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_omni.model_executor.layers.graphed import record
from vllm_omni.model_executor.layers.snake import SnakeBeta

_TAPS = 12
_MIN_DB = -115.0
_REFERENCE_DB = 20.0
_REPLAYED = 8
"""Requests of a batch that a graph decodes one after another. Alone on a GPU eight take 48 ms so and 22 ms together;
but without a graph kernels come one by one, and where other stages share the GPU each of them waits for its turn."""


def kaiser_sinc_filter(cutoff: float, half_width: float, taps: int) -> torch.Tensor:
    """Low-pass filter [1, 1, taps] with unit gain at zero; frequencies are in cycles per sample. Even ``taps`` only."""
    attenuation = 2.285 * (taps // 2 - 1) * math.pi * 4 * half_width + 7.95
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    elif attenuation >= 21:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    else:
        beta = 0.0
    window = torch.kaiser_window(taps, beta=beta, periodic=False, dtype=torch.float32)
    time = torch.arange(taps, dtype=torch.float32) - taps // 2 + 0.5
    taps_1d = window * torch.sinc(2 * cutoff * time)
    return (taps_1d / taps_1d.sum()).view(1, 1, taps)


class AntiAliasedSnake(nn.Module):
    """Upsample by two, SnakeBeta, downsample by two; [B, C, T] keeps its shape.

    One filter serves every channel, so the channels are folded into the batch. ``fused``: as one kernel, on a GPU.
    """

    filter: torch.Tensor
    fused = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act = SnakeBeta(channels)
        self.register_buffer("filter", kaiser_sinc_filter(0.25, 0.3, _TAPS), persistent=False)

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        if self.fused:
            from vllm_omni.model_executor.layers.snake_kernel import anti_aliased_snake

            return anti_aliased_snake(x_BCT, self.filter, self.act.alpha, self.act.beta)
        return self.plain(x_BCT)

    def plain(self, x_BCT: torch.Tensor) -> torch.Tensor:
        """The same in PyTorch."""
        batch, channels, length = x_BCT.shape
        pad = _TAPS // 2 - 1  # rows copied at each border before the transposed convolution
        cut = pad * 2 + (_TAPS - 2) // 2
        up = F.pad(x_BCT.reshape(batch * channels, 1, length), (pad, pad), mode="replicate")
        up = 2 * F.conv_transpose1d(up, self.filter, stride=2)[..., cut:-cut]
        active = self.act(up.view(batch, channels, 2 * length)).view(batch * channels, 1, 2 * length)
        down = F.conv1d(F.pad(active, (_TAPS // 2 - 1, _TAPS // 2), mode="replicate"), self.filter, stride=2)
        return down.view(batch, channels, length)


class AMPBlock(nn.Module):
    """Three residual pairs of dilated and plain convolutions, each after an anti-aliased activation."""

    def __init__(self, channels: int, kernel: int, dilations: list[int]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=d, padding=(kernel - 1) * d // 2) for d in dilations
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in dilations)
        self.activations = nn.ModuleList(AntiAliasedSnake(channels) for _ in range(2 * len(dilations)))

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        for i, (dilated, plain) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            first, second = self.activations[2 * i], self.activations[2 * i + 1]
            x_BCT = x_BCT + plain(second(dilated(first(x_BCT))))
        return x_BCT


class BigVGAN(nn.Module):
    """Log-mel spectrogram [B, mel_dim, M] -> waveform [B, M * hop] in [-1, 1], ``hop`` samples a mel frame."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, rates = config.upsample_initial_channel, config.upsample_rates
        self.hop = math.prod(rates)
        self.conv_pre = nn.Conv1d(config.mel_dim, width, 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ModuleList(
                [nn.ConvTranspose1d(width >> i, width >> (i + 1), kernel, rate, padding=(kernel - rate) // 2)]
            )
            for i, (rate, kernel) in enumerate(zip(rates, config.upsample_kernel_sizes, strict=True))
        )
        self.kernels = len(config.resblock_kernel_sizes)
        self.resblocks = nn.ModuleList(
            AMPBlock(width >> (i + 1), kernel, list(dilations))
            for i in range(len(rates))
            for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
        )
        self.activation_post = AntiAliasedSnake(width >> len(rates))
        self.conv_post = nn.Conv1d(width >> len(rates), 1, 7, padding=3, bias=False)
        self.reach = _reach(config)
        """Mel frames to either side that a frame's samples depend on."""

    def forward(self, mel_BCM: torch.Tensor) -> torch.Tensor:
        x_BCT = self.conv_pre(_normalise(mel_BCM))
        for i, up in enumerate(self.ups):
            x_BCT = up[0](x_BCT)
            blocks = self.resblocks[i * self.kernels : (i + 1) * self.kernels]
            total = blocks[0](x_BCT)
            for block in blocks[1:]:
                total = total + block(x_BCT)
            x_BCT = total / self.kernels
        return self.conv_post(self.activation_post(x_BCT)).clamp(-1, 1).squeeze(1)


def _reach(config: Any) -> int:
    """Mel frames on either side that a sample depends on, counted from the waveform back and rounded up."""
    snake = _TAPS // 2
    blocks = []
    for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True):
        blocks.append(sum((kernel - 1) * (dilation + 1) // 2 + 2 * snake for dilation in dilations))
    reach = 3 + snake
    for rate, kernel in reversed(list(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True))):
        reach = math.ceil((reach + max(blocks) + kernel) / rate)
    return reach + 3


class GraphedVocoder:
    """``BigVGAN`` as a CUDA graph for each of a few lengths of one request; other lengths, and larger batches, run it
    as it is. What a call returns is not touched by later calls."""

    def __init__(self, vocoder: BigVGAN) -> None:
        self._vocoder = vocoder
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}

    @property
    def lengths(self) -> list[int]:
        """Captured lengths in mel frames, in order."""
        return sorted(self._captured)

    def capture(self, lengths: Sequence[int], tried: Sequence[int] = ()) -> None:
        """Capture a graph for each of ``lengths`` mel frames.

        Args:
            lengths: mel frames.
            tried: the lengths for which convolutions try their algorithms, since the libraries' first guess for short
                signals is a slow one. It takes seconds a length.
        """
        pool = None
        weight = self._vocoder.conv_pre.weight
        for length in sorted(lengths, reverse=True):  # the largest first: the others fit into its memory
            mel = weight.new_zeros(1, weight.shape[1], length)
            with torch.backends.cudnn.flags(
                enabled=True, benchmark=length in tried, allow_tf32=torch.backends.cudnn.allow_tf32
            ):
                graph, wave = record(functools.partial(self._vocoder.forward, mel), pool)
            pool = graph.pool()
            self._captured[length] = graph, mel, wave

    def __call__(self, mel_BCM: torch.Tensor) -> torch.Tensor:
        """Waveforms [B, M * hop]."""
        batch, _, length = mel_BCM.shape
        if batch > _REPLAYED or length not in self._captured:
            wave: torch.Tensor = self._vocoder(mel_BCM)
            return wave
        graph, buffer, out = self._captured[length]
        waves = []
        for row in mel_BCM.split(1):
            buffer.copy_(row)
            graph.replay()
            waves.append(out.clone())
        return torch.cat(waves)


def _normalise(mel: torch.Tensor) -> torch.Tensor:
    """Natural-log amplitudes -> decibels -> [-1, 1]."""
    decibel = (mel * (20 / math.log(10))).clamp(min=_MIN_DB) - _REFERENCE_DB
    return (2 * (decibel - _MIN_DB) / -_MIN_DB - 1).clamp(-1, 1)
