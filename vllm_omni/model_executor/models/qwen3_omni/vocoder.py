"""Qwen3-Omni's vocoder: frames of 16 codes to a 24 kHz waveform.

Source of the architecture: ``Qwen3OmniMoeCode2Wav`` of transformers. A sliding-window transformer over frames, two
upsampling blocks (ConvNeXt), and a convolutional decoder with snake activations; 1920 samples a frame.

**What depends on what.** All layers look back only, but for the decoder's transposed convolutions, which look one input
step ahead. Sample ``j`` therefore depends on frames up to ``(j + lookahead) // 1920`` (``lookahead`` = 555 samples in
the released sizes), and n frames give ``1920 n - 555`` samples, which stay the same when more frames follow. Looking
back, the transformer reaches ``layers * (window - 1)`` frames and the convolutions ``conv_context`` (10) frames. A
window of frames with ``exact_context`` frames before the new ones gives the same samples as one run over everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_omni.model_executor.layers.dense import DenseLayer, DenseSpec, RMSNorm, rope_table, sliding_causal_mask
from vllm_omni.model_executor.layers.graphed import GraphedGrid
from vllm_omni.model_executor.layers.snake import SnakeBeta

_DILATIONS = (1, 3, 9)
_KERNEL = 7


class CausalConv(nn.Module):
    """1-D convolution that sees the past only: zeros stand for what lies before the start."""

    def __init__(self, c_in: int, c_out: int, kernel: int, dilation: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, kernel, dilation=dilation, groups=groups)
        self.reach = (kernel - 1) * dilation

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x_BCT, (self.reach, 0)))


class Upsample(nn.Module):
    """Transposed convolution, ``kernel - stride`` outputs cut off on both sides.

    T inputs give ``T * stride - (kernel - stride)`` outputs.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(c_in, c_out, kernel, stride=stride)
        self.stride = stride
        self.cut = kernel - stride

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        out = self.conv(x_BCT)
        return out[..., self.cut : out.shape[-1] - self.cut] if self.cut else out


class ConvNeXt(nn.Module):
    """Depthwise convolution and a pointwise MLP with a learnt gate (Liu et al. 2022, arXiv 2201.03545)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = CausalConv(channels, channels, _KERNEL, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        y_BTC = self.norm(self.dwconv(x_BCT).transpose(1, 2))
        y_BTC = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y_BTC)))
        return x_BCT + y_BTC.transpose(1, 2)


class ResidualUnit(nn.Module):
    """Two snake-activated convolutions around a skip."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.act1 = SnakeBeta(channels)
        self.conv1 = CausalConv(channels, channels, _KERNEL, dilation=dilation)
        self.act2 = SnakeBeta(channels)
        self.conv2 = CausalConv(channels, channels, 1)

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        return x_BCT + self.conv2(self.act2(self.conv1(self.act1(x_BCT))))


class DecoderBlock(nn.Module):
    """Upsampling by ``rate`` and three residual units."""

    def __init__(self, c_in: int, c_out: int, rate: int) -> None:
        super().__init__()
        units = [ResidualUnit(c_out, dilation) for dilation in _DILATIONS]
        self.block = nn.ModuleList([SnakeBeta(c_in), Upsample(c_in, c_out, 2 * rate, rate), *units])

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        for part in self.block:
            x_BCT = part(x_BCT)
        return x_BCT


class FrameTransformer(nn.Module):
    """Sliding-window transformer over frames."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.spec = DenseSpec(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            eps=config.rms_norm_eps,
            rope_theta=config.rope_parameters["rope_theta"],
            layer_scale=True,
        )
        self.window = config.sliding_window
        self.layers = nn.ModuleList([DenseLayer(self.spec) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def reach(self) -> int:
        """Frames before a frame that its output depends on."""
        return len(self.layers) * (self.window - 1)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        length = x_BTC.shape[1]
        rope = rope_table(length, self.spec, x_BTC.device, x_BTC.dtype)
        mask = sliding_causal_mask(length, self.window, x_BTC.device)
        for layer in self.layers:
            x_BTC = layer(x_BTC, rope, mask)
        return self.norm(x_BTC)


@dataclass(frozen=True)
class CodeWindow:
    """Frames of one request to decode."""

    codes_TQ: torch.Tensor
    """[frames, code groups] integers."""
    context: int = 0
    """Leading frames whose samples were given before; 0 for the first window of a waveform."""
    start: int = 0
    """Frames of the waveform that lie before this window."""


class Vocoder(nn.Module):
    """Codes to waveform. Parameter names are the checkpoint's below ``code2wav.``"""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.codebook_size, self.groups = config.codebook_size, config.num_quantizers
        self.code_embedding = nn.Embedding(config.codebook_size * config.num_quantizers, config.hidden_size)
        self.pre_transformer = FrameTransformer(config)
        self.upsample = nn.ModuleList(
            nn.ModuleList([Upsample(config.hidden_size, config.hidden_size, rate, rate), ConvNeXt(config.hidden_size)])
            for rate in config.upsampling_ratios
        )
        widths = [config.decoder_dim // 2**i for i in range(len(config.upsample_rates) + 1)]
        blocks = [DecoderBlock(widths[i], widths[i + 1], rate) for i, rate in enumerate(config.upsample_rates)]
        self.decoder = nn.ModuleList(
            [
                CausalConv(config.hidden_size, widths[0], _KERNEL),
                *blocks,
                SnakeBeta(widths[-1]),
                CausalConv(widths[-1], 1, _KERNEL),
            ]
        )
        self.graphed_frames, self.graphed_wave = GraphedGrid(self.frames), GraphedGrid(self.wave)
        self.samples_per_frame, self.lookahead, self.conv_context = _geometry([*self.upsample, self.decoder])

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.code_embedding.weight.device

    @property
    def exact_context(self) -> int:
        """Context frames from which on a window's new samples equal those of one run over all frames."""
        return self.pre_transformer.reach + self.conv_context + 1

    def samples(self, window: CodeWindow) -> int:
        """Samples that ``decode`` returns for ``window``."""
        frames = window.codes_TQ.shape[0] - window.context
        return frames * self.samples_per_frame - (0 if window.context else self.lookahead)

    def frames(self, codes_BTQ: torch.Tensor) -> torch.Tensor:
        """Transformer output [B, T, C] of codes [B, T, groups]."""
        offset = torch.arange(self.groups, device=codes_BTQ.device) * self.codebook_size
        return self.pre_transformer(self.code_embedding(codes_BTQ + offset).mean(2))

    def wave(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """Waveform [B, T * samples_per_frame - lookahead] of transformer outputs."""
        x_BCT = x_BTC.transpose(1, 2)
        for blocks in self.upsample:
            for block in blocks:
                x_BCT = block(x_BCT)
        for block in self.decoder:
            x_BCT = block(x_BCT)
        return x_BCT[:, 0].clamp(-1, 1)

    def decode(self, windows: Sequence[CodeWindow], max_frames: int = 2400) -> list[torch.Tensor]:
        """New samples of each window, batched over windows.

        Args:
            windows: what to decode. One that does not start at the waveform's start needs a ``context`` of more than
                ``conv_context`` frames.
            max_frames: frames that one run of the convolutions may hold (batch times padded length); longer windows
                are cut and their parts joined, which changes no sample.

        Returns:
            Per window ``samples(window)`` float32 samples: those that depend on the new frames. The first window of a
            waveform keeps ``lookahead`` samples back, every later one gives them first.
        """
        hidden: list[torch.Tensor] = [torch.empty(0)] * len(windows)
        for group in _groups([w.codes_TQ.shape[0] for w in windows], 4 * max_frames):
            out = self.graphed_frames(_pad([windows[i].codes_TQ for i in group]))
            for row, i in enumerate(group):
                hidden[i] = out[row, : windows[i].codes_TQ.shape[0]]
        pieces = [(i, *piece) for i, window in enumerate(windows) for piece in self._pieces(window, max_frames)]
        waves: list[list[torch.Tensor]] = [[] for _ in windows]
        for group in _groups([end - start for _, start, _, end in pieces], max_frames):
            out = self.graphed_wave(_pad([hidden[pieces[g][0]][pieces[g][1] : pieces[g][3]] for g in group])).float()
            for row, g in enumerate(group):
                i, start, fresh, end = pieces[g]
                skip = (fresh - start) * self.samples_per_frame - self.lookahead if fresh else 0
                waves[i].append(out[row, skip : (end - start) * self.samples_per_frame - self.lookahead])
        return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in waves]

    def capture(self, batches: Sequence[int], steady_frames: int) -> None:
        """Capture graphs for the windows of streams: of few frames at the beginning, of ``steady_frames`` later."""
        context = self.conv_context + 1
        grown = [frames for frames in (4, 4 + 8, context + 16, context + steady_frames) if frames <= 64]
        codes = torch.zeros(1, 1, self.groups, dtype=torch.int64, device=self.device)
        self.graphed_frames.capture(
            [(b, t) for b in batches for t in (*grown, 128, 256, 512, 640) if b * t <= 5120], codes
        )
        hidden = self.code_embedding(codes[:, :, 0])
        self.graphed_wave.capture([(b, t) for b in batches for t in grown if b * t <= 640], hidden)

    def _pieces(self, window: CodeWindow, max_frames: int) -> Iterator[tuple[int, int, int]]:
        """Cut a window for the convolutions: (start, first fresh frame, end) in frames of the window."""
        length, fresh = window.codes_TQ.shape[0], window.context
        if window.start and fresh <= self.conv_context:
            raise ValueError(f"context of {fresh} frames: the convolutions need more than {self.conv_context}")
        while fresh < length:
            start = max(0, fresh - self.conv_context - 1)
            end = min(length, start + max_frames)
            yield start, fresh, end
            fresh = end


def _geometry(parts: Sequence[nn.Module]) -> tuple[int, int, int]:
    """(samples a frame, samples of look-ahead, frames of look-back) of a chain of convolutions."""
    layers = [m for part in parts for m in part.modules() if isinstance(m, CausalConv | Upsample)]
    rate, lookahead, reach = 1, 0, 0
    for layer in layers:
        if isinstance(layer, Upsample):
            rate, lookahead = rate * layer.stride, lookahead * layer.stride + layer.cut
    for layer in reversed(layers):
        reach = -(-reach // layer.stride) if isinstance(layer, Upsample) else reach + layer.reach
    return rate, lookahead, reach


def _groups(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in groups whose padded size (count times longest) stays within ``budget``; similar lengths together."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        if group and (len(group) + 1) * lengths[group[0]] > budget:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _pad(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack [T_i, C] tensors into [B, T, C], zeros behind the shorter ones (nothing looks that far ahead)."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
