"""FLUX.1's transformer: double-stream blocks, then single-stream blocks that run attention and MLP side by side.

Reference for the mathematics: black-forest-labs/flux, and ``FluxTransformer2DModel`` of diffusers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.distributed.parallel_state import get_tp_world_size
from vllm_omni.diffusion.layers.attention_blocks import JointAttention, normed_qkv
from vllm_omni.diffusion.layers.embeddings import TimestepEmbedding, sinusoid
from vllm_omni.diffusion.layers.linear import PackedRowParallelLinear, StackedLinear, merged_linear
from vllm_omni.diffusion.layers.mlp import FeedForward
from vllm_omni.diffusion.layers.norm import QKNorm, gated_residual, modulated_norm
from vllm_omni.diffusion.layers.rope import RotaryEmbedding, axial_rope
from vllm_omni.diffusion.models.common.transformer import DiTInputs, DiTModel, RopeTables, Streams, joint_metadata
from vllm_omni.diffusion.models.common.weights import Rule, WeightsMapper

_DOUBLE = r"(transformer_blocks\.\d+)"
_SINGLE = r"(single_transformer_blocks\.\d+)"
_MLP_RATIO = 4


class FluxTransformerBlock(nn.Module):
    """Joint attention and an MLP for each stream, all modulated (MMDiT)."""

    def __init__(self, dim: int, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.attn = JointAttention(dim, num_heads, head_size)
        self.ff = FeedForward(dim, _MLP_RATIO * dim)
        self.ff_context = FeedForward(dim, _MLP_RATIO * dim)

    def forward(
        self,
        img_BSD: torch.Tensor,
        txt_BTD: torch.Tensor,
        modulation_BM: torch.Tensor,
        rope_img: RotaryEmbedding,
        rope_txt: RotaryEmbedding,
        metadata: AttentionMetadata | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both streams after the block; ``modulation_BM`` holds 6 vectors for the picture and 6 for the text."""
        m = modulation_BM.unsqueeze(1).chunk(12, dim=-1)
        img_out, txt_out = self.attn(
            modulated_norm(img_BSD, m[1], m[0]), modulated_norm(txt_BTD, m[7], m[6]), rope_img, rope_txt, metadata
        )
        img_BSD = gated_residual(img_BSD, m[2], img_out)
        img_BSD = gated_residual(img_BSD, m[5], self.ff(modulated_norm(img_BSD, m[4], m[3])))
        txt_BTD = gated_residual(txt_BTD, m[8], txt_out)
        txt_BTD = gated_residual(txt_BTD, m[11], self.ff_context(modulated_norm(txt_BTD, m[10], m[9])))
        return img_BSD, txt_BTD


class FluxSingleTransformerBlock(nn.Module):
    """Attention and MLP of the joined streams in parallel: one matrix in, one matrix out."""

    def __init__(self, dim: int, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        hidden = _MLP_RATIO * dim
        self.qkv_mlp = merged_linear(dim, (dim, dim, dim, hidden))
        self.norm = QKNorm(head_size)
        self.attn = Attention(num_heads // get_tp_world_size(), head_size)
        self.proj_out = PackedRowParallelLinear((dim, hidden), dim)
        self._split = (3 * dim // get_tp_world_size(), hidden // get_tp_world_size())

    def forward(
        self,
        x_BSD: torch.Tensor,
        modulation_BM: torch.Tensor,
        rope: RotaryEmbedding,
        metadata: AttentionMetadata | None,
    ) -> torch.Tensor:
        """The joined stream after the block; ``modulation_BM`` holds 3 vectors."""
        shift, scale, gate = modulation_BM.unsqueeze(1).chunk(3, dim=-1)
        qkv, hidden = self.qkv_mlp(modulated_norm(x_BSD, scale, shift)).split(self._split, dim=-1)
        qk, v = normed_qkv(qkv, self.norm, rope, self.head_size)
        attended = self.attn(qk[:, :, 0], qk[:, :, 1], v, metadata).flatten(2)
        out = self.proj_out(torch.cat((attended, functional.gelu(hidden, approximate="tanh")), dim=-1))
        return gated_residual(x_BSD, gate, out)


class FluxTimeTextEmbedding(nn.Module):
    """Sum of the embedded timestep, guidance (dev alone) and pooled text."""

    def __init__(self, dim: int, pooled_dim: int, guidance_embeds: bool) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, dim)
        self.guidance_embedder = TimestepEmbedding(256, dim) if guidance_embeds else None
        self.text_embedder = TimestepEmbedding(pooled_dim, dim)

    def forward(
        self, timesteps_N: torch.Tensor, pooled_BD: torch.Tensor, guidance_B: torch.Tensor | None
    ) -> torch.Tensor:
        """[N, B, D]. Timestep and guidance are rounded to the model's dtype before the sinusoid (as there)."""
        dtype = pooled_BD.dtype
        time = self.timestep_embedder(sinusoid(timesteps_N.to(dtype) / 1000 * 1000).to(dtype))[:, None]
        if self.guidance_embedder is not None:
            assert guidance_B is not None
            time = time + self.guidance_embedder(sinusoid(guidance_B.to(dtype) * 1000).to(dtype))[None]
        out: torch.Tensor = time + self.text_embedder(pooled_BD)[None]
        return out


@functools.lru_cache(maxsize=16)
def flux_rope(axes_dim: tuple[int, ...], grid: tuple[int, ...], text_tokens: int, device: torch.device) -> RopeTables:
    """Tables for a picture of ``grid`` (rows, columns) at (0, row, column) and text at (0, 0, 0)."""
    rows, columns = grid
    row = torch.arange(rows, device="cpu").repeat_interleave(columns)
    column = torch.arange(columns, device="cpu").repeat(rows)
    text = torch.zeros(text_tokens, dtype=row.dtype, device="cpu")
    positions = (torch.cat((torch.zeros_like(row), text)), torch.cat((row, text)), torch.cat((column, text)))
    return RopeTables.from_joint(axial_rope(positions, axes_dim, dtype=torch.float64), rows * columns, device)


class FluxTransformer2DModel(DiTModel):
    """FLUX.1-dev and -schnell; the arguments are those of the checkpoint's transformer/config.json.

    Args:
        od_config: configuration of the stage (every model takes it; this one needs nothing of it).
        in_channels: channels of a packed latent.
        out_channels: channels of the prediction; default as ``in_channels``.
        num_layers: double-stream blocks.
        num_single_layers: single-stream blocks.
        attention_head_dim: width of a head.
        num_attention_heads: heads.
        joint_attention_dim: width of the text states.
        pooled_projection_dim: width of the pooled text.
        guidance_embeds: whether guidance is embedded (dev).
        axes_dims_rope: width of a head turned by each position axis.
        patch_size: 1; packing is done by the pipeline.
    """

    _repeated_blocks: ClassVar[list[str]] = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    _sp_plan: ClassVar[Any] = {"split": {"img_BSD": 1}, "gather": {"img_BSD": 1}}
    weights_mapper = WeightsMapper(
        Rule(_DOUBLE + r"\.attn\.to_([qkv])\.(\w+)", r"\1.attn.qkv.\3", r"\2"),
        Rule(_DOUBLE + r"\.attn\.add_([qkv])_proj\.(\w+)", r"\1.attn.add_qkv.\3", r"\2"),
        Rule(_DOUBLE + r"\.attn\.norm_([qk])\.weight", r"\1.attn.norm.weight", r"\2"),
        Rule(_DOUBLE + r"\.attn\.norm_added_([qk])\.weight", r"\1.attn.norm_added.weight", r"\2"),
        Rule(_DOUBLE + r"\.attn\.to_out\.0\.(\w+)", r"\1.attn.to_out.\2"),
        Rule(_DOUBLE + r"\.(ff|ff_context)\.net\.0\.proj\.(\w+)", r"\1.\2.up.\3"),
        Rule(_DOUBLE + r"\.(ff|ff_context)\.net\.2\.(\w+)", r"\1.\2.down.\3"),
        Rule(_SINGLE + r"\.attn\.to_([qkv])\.(\w+)", r"\1.qkv_mlp.\3", r"part_\2"),
        Rule(_SINGLE + r"\.proj_mlp\.(\w+)", r"\1.qkv_mlp.\2", "part_mlp"),
        Rule(_SINGLE + r"\.attn\.norm_([qk])\.weight", r"\1.norm.weight", r"\2"),
        Rule(_DOUBLE + r"\.(norm1|norm1_context)\.linear\.(\w+)", r"modulation.\3", r"\1.\2"),
        Rule(_SINGLE + r"\.norm\.linear\.(\w+)", r"modulation.\2", r"\1"),
        Rule(r"norm_out\.linear\.(\w+)", r"modulation.\1", "norm_out"),
        shard_ids={"part_q": 0, "part_k": 1, "part_v": 2, "part_mlp": 3},
    )

    def __init__(
        self,
        *,
        od_config: Any = None,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.guidance_embeds = guidance_embeds
        self.in_channels = in_channels
        self._axes_dim = tuple(axes_dims_rope)
        self.x_embedder = nn.Linear(in_channels, dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.time_text_embed = FluxTimeTextEmbedding(dim, pooled_projection_dim, guidance_embeds)
        self.transformer_blocks = nn.ModuleList(
            FluxTransformerBlock(dim, num_attention_heads, attention_head_dim) for _ in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(dim, num_attention_heads, attention_head_dim) for _ in range(num_single_layers)
        )
        parts = {}
        for i in range(num_layers):
            parts[f"transformer_blocks.{i}.norm1"] = 6 * dim
            parts[f"transformer_blocks.{i}.norm1_context"] = 6 * dim
        parts.update({f"single_transformer_blocks.{i}": 3 * dim for i in range(num_single_layers)})
        parts["norm_out"] = 2 * dim
        self.modulation = StackedLinear(dim, parts)
        self._sizes = [12 * dim] * num_layers + [3 * dim] * num_single_layers + [2 * dim]
        self.proj_out = nn.Linear(dim, patch_size * patch_size * (out_channels or in_channels))

    def embed(self, inputs: DiTInputs) -> Streams:
        """See ``DiTModel.embed``."""
        img_tokens, text_tokens = inputs.latents_BSC.shape[1], inputs.text_BTD.shape[1]
        device = inputs.latents_BSC.device
        return Streams(
            img_BSD=self.x_embedder(inputs.latents_BSC),
            txt_BTD=self.context_embedder(inputs.text_BTD),
            modulation_BM=inputs.modulation_BM,
            rope=flux_rope(self._axes_dim, inputs.grid, text_tokens, device),
            attention=joint_metadata(inputs.text_lengths, text_tokens, img_tokens, device),
        )

    def run_blocks(self, streams: Streams) -> Streams:
        """See ``DiTModel.run_blocks``."""
        img, txt, rope = streams.img_BSD, streams.txt_BTD, streams.rope
        *modulations, last = streams.modulation_BM.split(self._sizes, dim=-1)
        doubles = len(self.transformer_blocks)
        for block, modulation in zip(self.transformer_blocks, modulations[:doubles], strict=True):
            img, txt = block(img, txt, modulation, rope.img, rope.txt, streams.attention)
        joined = torch.cat((img, txt), dim=1)
        for block, modulation in zip(self.single_transformer_blocks, modulations[doubles:], strict=True):
            joined = block(joined, modulation, rope.joint, streams.attention)
        img, txt = joined.split((img.shape[1], txt.shape[1]), dim=1)
        return Streams(img, txt, last, rope, streams.attention)

    def head(self, streams: Streams) -> torch.Tensor:
        """See ``DiTModel.head``."""
        scale, shift = streams.modulation_BM.unsqueeze(1).chunk(2, dim=-1)
        out: torch.Tensor = self.proj_out(modulated_norm(streams.img_BSD, scale, shift))
        return out

    def time_embedding(
        self, timesteps_N: torch.Tensor, pooled_BD: torch.Tensor | None, guidance_B: torch.Tensor | None
    ) -> torch.Tensor:
        """See ``DiTModel.time_embedding``."""
        assert pooled_BD is not None
        out: torch.Tensor = self.time_text_embed(timesteps_N, pooled_BD, guidance_B)
        return out

    def scale_columns(self) -> torch.Tensor:
        """See ``DiTModel.scale_columns``: vectors 1 and 4 of six, 1 of three, 0 of the last two."""
        dim = self.x_embedder.out_features
        rows: list[bool] = []
        for size in self._sizes[:-1]:
            rows += [False, True, False, False, True, False] * 2 if size == 12 * dim else [False, True, False]
        return torch.tensor([*rows, True, False]).repeat_interleave(dim)
