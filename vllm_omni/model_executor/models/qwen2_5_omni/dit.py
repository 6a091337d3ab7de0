"""Flow-matching transformer of token2wav: codec tokens and a voice -> mel spectrogram.

Attention never leaves a block of ``block_size`` mel frames and, in a few layers, its left or right neighbour. So the
frames of any number of requests are packed into one batch of blocks, [N, S, C] with S = ``block_size``: no padding but
each request's last block, cost linear in length, and a request's result does not depend on who shares the batch.

Module names are those of the checkpoint (``token2wav.code2wav_dit_model``). Peebles & Xie, "DiT", 2022.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_omni.model_executor.models.qwen2_5_omni.ecapa import ReferenceEncoder

_TIME_FREQS = 256
_EPS = 1e-6


@dataclass
class BlockLayout:
    """How packed blocks belong together; N blocks of S frames."""

    cos: torch.Tensor
    """[N, S, 1, head_dim] rotary table by the frame's number within its request, both of a pair alike."""
    sin: torch.Tensor
    """Same shape as ``cos``."""
    valid: torch.Tensor
    """[N, S] bool: frame is no padding."""
    back: torch.Tensor
    """[N, S] bool: the frames of the block before that may be attended to (none in a request's first block)."""
    ahead: torch.Tensor
    """[N, S] bool: the same for the block after."""
    padded: bool
    """Whether any frame is padding."""

    def mask(self, look_back: bool, look_ahead: bool) -> torch.Tensor | None:
        """[N, 1, 1, keys] bool for a layer that looks at the given neighbours; ``None`` when everything is allowed."""
        if not (look_back or look_ahead or self.padded):
            return None
        parts = [self.back] * look_back + [self.valid] + [self.ahead] * look_ahead
        return torch.cat(parts, dim=1)[:, None, None]


class _NoAffineNorm(nn.LayerNorm):
    def __init__(self, dim: int) -> None:
        super().__init__(dim, elementwise_affine=False, eps=_EPS)


class _Modulation(nn.Module):
    """Linear map of the activated time embedding; ``norm`` of the checkpoint class has no weights."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim * parts)


class _Attention(nn.Module):
    """Attention inside a block and to its neighbours; rotary embedding on head 0 alone, as the model was trained."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        inner = config.head_dim * config.num_attention_heads
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.to_q = nn.Linear(config.hidden_size, inner)
        self.to_k = nn.Linear(config.hidden_size, inner)
        self.to_v = nn.Linear(config.hidden_size, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, config.hidden_size)])
        self._joined: tuple[torch.Tensor, torch.Tensor] | None = None

    def join(self) -> None:
        """One product for queries, keys and values, and for the turned pairs of head 0 of queries and keys, which the
        rotation adds. To be called when the weights change."""
        parts = [self.to_q, self.to_k, self.to_v]
        weights, biases = [part.weight for part in parts], [part.bias for part in parts]
        turned = [_turned_pairs(value[: self.head_dim]) for value in weights[:2]]
        turned_biases = [_turned_pairs(value[: self.head_dim]) for value in biases[:2]]
        self._joined = torch.cat([*weights, *turned]).detach(), torch.cat([*biases, *turned_biases]).detach()

    def forward(
        self, x_NSC: torch.Tensor, layout: BlockLayout, mask: torch.Tensor | None, look_back: bool, look_ahead: bool
    ) -> torch.Tensor:
        if self._joined is None:
            self.join()
        assert self._joined is not None
        out = F.linear(x_NSC, *self._joined)
        width = 3 * self.heads * self.head_dim
        qkv_NS3HD = out[..., :width].unflatten(-1, (3, self.heads, self.head_dim))
        turned_NS2D = out[..., width:].unflatten(-1, (2, self.head_dim))
        qkv_NS3HD[:, :, :2, 0].mul_(layout.cos).addcmul_(turned_NS2D, layout.sin)
        q, k, v = qkv_NS3HD.permute(2, 0, 3, 1, 4)
        k, v = _with_neighbours(k, look_back, look_ahead), _with_neighbours(v, look_back, look_ahead)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))


def _turned_pairs(rows: torch.Tensor) -> torch.Tensor:
    """Rows (-r1, r0, -r3, r2, ...) of (r0, r1, r2, r3, ...): a quarter turn of every pair."""
    return torch.stack([-rows[1::2], rows[0::2]], dim=1).flatten(0, 1)


def _with_neighbours(x_NHSD: torch.Tensor, look_back: bool, look_ahead: bool) -> torch.Tensor:
    """Keys or values of the neighbouring blocks before and after the own ones; wrong neighbours are masked later."""
    if not (look_back or look_ahead):
        return x_NHSD
    parts = [x_NHSD.roll(1, 0)] * look_back + [x_NHSD] + [x_NHSD.roll(-1, 0)] * look_ahead
    return torch.cat(parts, dim=2)


class _FeedForward(nn.Module):
    def __init__(self, dim: int, mult: int) -> None:
        super().__init__()
        self.ff = nn.ModuleList([nn.Linear(dim, dim * mult), nn.Identity(), nn.Identity(), nn.Linear(dim * mult, dim)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ff[3](F.gelu(self.ff[0](x), approximate="tanh"))


class _Layer(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.look_back = index in config.look_backward_layers
        self.look_ahead = index in config.look_ahead_layers
        self.attn_norm = _Modulation(config.hidden_size, 6)
        self.attn = _Attention(config)
        self.ff = _FeedForward(config.hidden_size, config.ff_mult)
        self.norm = _NoAffineNorm(config.hidden_size)

    def forward(self, x_NSC: torch.Tensor, modulation: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation.chunk(6)
        mask = layout.mask(self.look_back, self.look_ahead)
        normed = torch.addcmul(shift, self.norm(x_NSC), scale)
        x_NSC = torch.addcmul(x_NSC, gate, self.attn(normed, layout, mask, self.look_back, self.look_ahead))
        normed = torch.addcmul(shift_ff, self.norm(x_NSC), scale_ff)
        return torch.addcmul(x_NSC, gate_ff, self.ff(normed))


class _InputEmbed(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.sizes = (config.mel_dim, config.enc_dim, config.emb_dim, config.enc_emb_dim)
        self.proj = nn.Linear(sum(self.sizes), config.hidden_size)
        self.spk_encoder = ReferenceEncoder(config)


class _CodecEmbed(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.codec_embed = nn.Embedding(config.num_embeds + 1, config.emb_dim)


class _TimeEmbed(nn.Module):
    """Time in [0, 1] -> [T, C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.time_mlp = nn.ModuleList([nn.Linear(_TIME_FREQS, dim), nn.SiLU(), nn.Linear(dim, dim)])

    def forward(self, time_T: torch.Tensor) -> torch.Tensor:
        half = _TIME_FREQS // 2
        step = math.log(10000) / (half - 1)
        freqs = torch.exp(torch.arange(half, device=time_T.device).float() * -step)
        angles = 1000 * time_T[:, None] * freqs
        x = torch.cat([angles.sin(), angles.cos()], dim=-1)
        for layer in self.time_mlp:
            x = layer(x)
        return x


class CodecDiT(nn.Module):
    """Velocity field of the flow that turns noise into a mel spectrogram, conditioned on codes and a voice."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.time_embed = _TimeEmbed(config.hidden_size)
        self.text_embed = _CodecEmbed(config)
        self.input_embed = _InputEmbed(config)
        self.transformer_blocks = nn.ModuleList(_Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm_out = _Modulation(config.hidden_size, 2)
        self.norm = _NoAffineNorm(config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, config.mel_dim)

    @property
    def num_codes(self) -> int:
        """Codes 0 .. ``num_codes - 1`` have an embedding."""
        return self.text_embed.codec_embed.num_embeddings

    def layout(self, frames: Sequence[int]) -> BlockLayout:
        """Layout of requests with ``frames[i]`` mel frames, each starting a new block."""
        size, device = self.config.block_size, self.proj_out.weight.device
        valid, position, back, ahead = [], [], [], []
        for count in frames:
            blocks = -(-count // size)
            index = torch.arange(blocks * size).view(blocks, size)
            own = index < count
            none = torch.zeros(1, size, dtype=torch.bool)
            position.append(index)
            valid.append(own)
            back.append(torch.cat([none, own[:-1]]))
            ahead.append(torch.cat([own[1:], none]))
        dim = self.config.head_dim
        inv_freq = 1.0 / (
            self.config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
        )
        angles = (torch.cat(position)[:, :, None, None].float() * inv_freq).repeat_interleave(2, dim=-1)
        own = torch.cat(valid)
        return BlockLayout(
            cos=angles.cos().to(device),
            sin=angles.sin().to(device),
            valid=own.to(device),
            back=torch.cat(back).to(device),
            ahead=torch.cat(ahead).to(device),
            padded=not bool(own.all()),
        )

    def voice_vectors(self, ref_mel_MC: torch.Tensor, speaker_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a voice adds to every frame before the first layer, [C] each: with the voice, and without it."""
        mel, enc, emb, _ = self.input_embed.sizes
        weight, bias = self.input_embed.proj.weight, self.input_embed.proj.bias
        w_enc, w_spk = weight[:, mel : mel + enc], weight[:, mel + enc + emb :]
        encoded = self.input_embed.spk_encoder(torch.stack([ref_mel_MC, torch.zeros_like(ref_mel_MC)]))
        plain = encoded[1] @ w_enc.T + bias
        return encoded[0] @ w_enc.T + speaker_C @ w_spk.T + bias, plain

    def code_rows(self, codes_T: torch.Tensor) -> torch.Tensor:
        """What codes add to their mel frames before the first layer: [T * repeats, C]."""
        mel, enc, emb, _ = self.input_embed.sizes
        weight = self.input_embed.proj.weight[:, mel + enc : mel + enc + emb]
        return (self.text_embed.codec_embed(codes_T) @ weight.T).repeat_interleave(self.config.repeats, dim=0)

    def modulations(self, time_T: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Modulation rows of every layer ([T, 6C] each) and of the output ([T, 2C]) for the given times; the scales
        among them are one more than the model's, so that they multiply."""
        emb, size = F.silu(self.time_embed(time_T)), self.config.hidden_size
        layers = [layer.attn_norm.linear(emb) for layer in self.transformer_blocks]
        for rows in layers:
            rows[:, size : 2 * size] += 1
            rows[:, 4 * size : 5 * size] += 1
        out = self.norm_out.linear(emb)
        out[:, :size] += 1
        return layers, out

    def join_weights(self) -> None:
        """Prepare what is derived from the weights; to be called when they change."""
        for layer in self.transformer_blocks:
            layer.attn.join()

    def forward(
        self,
        x_NSM: torch.Tensor,
        condition_NSC: torch.Tensor,
        modulation: tuple[list[torch.Tensor], torch.Tensor],
        layout: BlockLayout,
    ) -> torch.Tensor:
        """Velocity [N, S, mel_dim] at packed frames ``x``.

        Args:
            x_NSM: noisy mel frames.
            condition_NSC: voice and code rows of each frame (``voice_vectors`` + ``code_rows``).
            modulation: one row of each table of ``modulations``.
            layout: of the packed blocks.
        """
        layers, (scale, shift) = modulation[0], modulation[1].chunk(2)
        h = F.linear(x_NSM, self.input_embed.proj.weight[:, : self.input_embed.sizes[0]]) + condition_NSC
        for layer, row in zip(self.transformer_blocks, layers, strict=True):
            h = layer(h, row, layout)
        return self.proj_out(torch.addcmul(shift, self.norm(h), scale))
