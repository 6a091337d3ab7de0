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
    frames: torch.Tensor
    """[N, 3] int32: how many frames of the block before, of the block itself (the others are padding) and of the block
    after count. A request's first block has none before it, its last block none after it."""
    padded: bool
    """Whether any frame is padding."""

    def mask(self, look_back: bool, look_ahead: bool) -> torch.Tensor | None:
        """[N, 1, 1, keys] bool for a layer that looks at the given neighbours; ``None`` when everything is allowed."""
        if not (look_back or look_ahead or self.padded):
            return None
        counts = self.frames[:, 1 - look_back : 2 + look_ahead, None]
        return (torch.arange(self.cos.shape[1], device=counts.device) < counts).flatten(1)[:, None, None]


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
        self, x_NSC: torch.Tensor, layout: BlockLayout, look_back: bool, look_ahead: bool, fused: bool
    ) -> torch.Tensor:
        if self._joined is None:
            self.join()
        assert self._joined is not None
        out = F.linear(x_NSC, *self._joined)
        if fused:
            from vllm_omni.model_executor.models.qwen2_5_omni.dit_kernels import block_attention

            mixed = block_attention(out, layout.cos, layout.sin, layout.frames, self.heads, look_back, look_ahead)
            return self.to_out[0](mixed)
        width = 3 * self.heads * self.head_dim
        qkv_NS3HD = out[..., :width].unflatten(-1, (3, self.heads, self.head_dim))
        turned_NS2D = out[..., width:].unflatten(-1, (2, self.head_dim))
        qkv_NS3HD[:, :, :2, 0].mul_(layout.cos).addcmul_(turned_NS2D, layout.sin)
        q, k, v = qkv_NS3HD.permute(2, 0, 3, 1, 4)
        k, v = _with_neighbours(k, look_back, look_ahead), _with_neighbours(v, look_back, look_ahead)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask(look_back, look_ahead))
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
        self.proj_out = nn.Linear(config.hidden_size, config.mel_dim)
        self.fused = False
        """Whether kernels run what stands between the products."""

    @property
    def num_codes(self) -> int:
        """Codes 0 .. ``num_codes - 1`` have an embedding."""
        return self.text_embed.codec_embed.num_embeddings

    def layout(self, frames: Sequence[int]) -> BlockLayout:
        """Layout of requests with ``frames[i]`` mel frames, each starting a new block."""
        size, dim, device = self.config.block_size, self.config.head_dim, self.proj_out.weight.device
        rows = []
        for count in frames:
            full, rest = divmod(count, size)
            own = [size] * full + [rest] * bool(rest)
            rows += list(zip(range(len(own)), [0, *own[:-1]], own, [*own[1:], 0], strict=True))
        table = torch.tensor(rows, dtype=torch.int32).to(device)
        index = table[:, :1] * size + torch.arange(size, device=device)
        theta = self.config.rope_parameters["rope_theta"]
        inv_freq = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)).to(device)
        angles = (index[:, :, None, None].float() * inv_freq).repeat_interleave(2, dim=-1)
        padded = any(count % size for count in frames)
        return BlockLayout(angles.cos(), angles.sin(), table[:, 1:].contiguous(), padded)

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
        """Velocities at packed frames ``x``, one [S, mel_dim] a block of ``condition``.

        Args:
            x_NSM: noisy mel frames, N blocks.
            condition_NSC: voice and code rows of each frame (``voice_vectors`` + ``code_rows``). With several times N
                blocks (guidance), each N of them see the same ``x`` and give a velocity.
            modulation: one row of each table of ``modulations``.
            layout: of the blocks of ``condition_NSC``.
        """
        layers, (scale, shift) = modulation[0], modulation[1].chunk(2)
        rows = [row.chunk(6) for row in layers]
        x = F.linear(x_NSM, self.input_embed.proj.weight[:, : self.input_embed.sizes[0]])
        x = (condition_NSC.unflatten(0, (-1, len(x))) + x).flatten(0, 1)
        normed = self._norm(x, rows[0][1], rows[0][0])
        for i, layer in enumerate(self.transformer_blocks):
            _, _, gate, shift_ff, scale_ff, gate_ff = rows[i]
            mixed = layer.attn(normed, layout, layer.look_back, layer.look_ahead, self.fused)
            x, normed = self._add_norm(x, mixed, gate, scale_ff, shift_ff)
            after = rows[i + 1][1::-1] if i + 1 < len(rows) else (scale, shift)
            x, normed = self._add_norm(x, layer.ff(normed), gate_ff, *after)
        return self.proj_out(normed)

    def _norm(self, x_NSC: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor) -> torch.Tensor:
        if self.fused:
            from vllm_omni.model_executor.models.qwen2_5_omni.dit_kernels import norm_modulate

            return norm_modulate(x_NSC, scale_C, shift_C, _EPS)
        return torch.addcmul(shift_C, F.layer_norm(x_NSC, x_NSC.shape[-1:], eps=_EPS), scale_C)

    def _add_norm(
        self,
        x_NSC: torch.Tensor,
        y_NSC: torch.Tensor,
        gate_C: torch.Tensor,
        scale_C: torch.Tensor,
        shift_C: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + gate * y, and its norm, scaled and shifted."""
        if self.fused:
            from vllm_omni.model_executor.models.qwen2_5_omni.dit_kernels import add_norm_modulate

            return add_norm_modulate(x_NSC, y_NSC, gate_C, scale_C, shift_C, _EPS)
        total = torch.addcmul(x_NSC, gate_C, y_NSC)
        return total, self._norm(total, scale_C, shift_C)

    def use_kernels(self) -> str | None:
        """Run what stands between the products as kernels, on a GPU; if they do not work here, say why."""
        from vllm_omni.model_executor.layers.snake_kernel import check

        generator = torch.Generator().manual_seed(0)
        size, weight = self.config.block_size, self.proj_out.weight
        layout = self.layout([size * 3, size + 1])
        shape = (len(layout.cos), size, self.config.hidden_size)
        x = torch.randn(shape, generator=generator).to(weight)
        row = 1 + torch.randn(5, shape[-1], generator=generator).to(weight) / 8
        kinds = {(layer.look_back, layer.look_ahead): layer for layer in self.transformer_blocks}

        def run() -> torch.Tensor:
            out = [self._norm(x, row[0], row[1]), *self._add_norm(x, x, row[2], row[3], row[4])]
            out += [layer.attn(x, layout, *kind, self.fused) for kind, layer in kinds.items()]
            return torch.stack(out)

        self.fused = False
        want = run()
        self.fused = True
        wrong = check(run, want)
        self.fused = wrong is None
        return wrong
