"""Qwen-Image's transformer: 60 double-stream blocks (Qwen-Image technical report, 2025).

Reference for the mathematics: ``QwenImageTransformer2DModel`` of diffusers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.layers.attention_blocks import JointAttention
from vllm_omni.diffusion.layers.embeddings import TimestepEmbedding, sinusoid
from vllm_omni.diffusion.layers.linear import StackedLinear
from vllm_omni.diffusion.layers.mlp import FeedForward
from vllm_omni.diffusion.layers.norm import RMSNorm, gated_residual, modulated_norm
from vllm_omni.diffusion.layers.rope import RotaryEmbedding, axial_rope
from vllm_omni.diffusion.models.common.transformer import DiTInputs, DiTModel, RopeTables, Streams, joint_metadata
from vllm_omni.diffusion.models.common.weights import Rule, WeightsMapper
from vllm_omni.errors import ConfigError

_BLOCK = r"(transformer_blocks\.\d+)"
_MLP_RATIO = 4


class QwenImageTransformerBlock(nn.Module):
    """Joint attention and an MLP for each stream, all modulated."""

    def __init__(self, dim: int, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.attn = JointAttention(dim, num_heads, head_size)
        self.img_mlp = FeedForward(dim, _MLP_RATIO * dim)
        self.txt_mlp = FeedForward(dim, _MLP_RATIO * dim)

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
        txt_BTD = gated_residual(txt_BTD, m[8], txt_out)
        img_BSD = gated_residual(img_BSD, m[5], self.img_mlp(modulated_norm(img_BSD, m[4], m[3])))
        txt_BTD = gated_residual(txt_BTD, m[11], self.txt_mlp(modulated_norm(txt_BTD, m[10], m[9])))
        return img_BSD, txt_BTD


@functools.lru_cache(maxsize=16)
def qwen_image_rope(
    axes_dim: tuple[int, ...], grid: tuple[int, ...], text_tokens: int, device: torch.device
) -> RopeTables:
    """Tables for a picture of ``grid`` (rows, columns), centred on zero, and text from half the longer side on."""
    rows, columns = grid
    row = torch.arange(rows, device="cpu") - (rows - rows // 2)
    column = torch.arange(columns, device="cpu") - (columns - columns // 2)
    text = max(rows // 2, columns // 2) + torch.arange(text_tokens, device="cpu")
    frame = torch.zeros(rows * columns, dtype=text.dtype, device="cpu")
    positions = (
        torch.cat((frame, text)),
        torch.cat((row.repeat_interleave(columns), text)),
        torch.cat((column.repeat(rows), text)),
    )
    return RopeTables.from_joint(axial_rope(positions, axes_dim), rows * columns, device)


class QwenImageTimeEmbedding(nn.Module):
    """The embedded timestep."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, dim)

    def forward(self, timesteps_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[N, D]. The timestep is rounded to the model's dtype, divided by 1000, scaled back in the sinusoid."""
        out: torch.Tensor = self.timestep_embedder(sinusoid(timesteps_N.to(dtype) / 1000, scale=1000).to(dtype))
        return out


class QwenImageTransformer2DModel(DiTModel):
    """Qwen-Image; the arguments are those of the checkpoint's transformer/config.json.

    Args:
        od_config: configuration of the stage (every model takes it; this one needs nothing of it).
        patch_size: latents packed into one token along each side.
        in_channels: channels of a packed latent.
        out_channels: channels of the unpacked prediction.
        num_layers: blocks.
        attention_head_dim: width of a head.
        num_attention_heads: heads.
        joint_attention_dim: width of the text states.
        axes_dims_rope: width of a head turned by each position axis.
        guidance_embeds: must be false; no such checkpoint is known.
        zero_cond_t: must be false; for edit checkpoints.
        use_additional_t_cond: must be false; for layered checkpoints.
        use_layer3d_rope: must be false; for layered checkpoints.

    Raises:
        ConfigError: the configuration is that of another member of the family.
    """

    _repeated_blocks: ClassVar[list[str]] = ["QwenImageTransformerBlock"]
    _sp_plan: ClassVar[Any] = {"split": {"img_BSD": 1}, "gather": {"img_BSD": 1}}
    _unused_config_keys: ClassVar[frozenset[str]] = frozenset({"pooled_projection_dim"})
    weights_mapper = WeightsMapper(
        Rule(_BLOCK + r"\.attn\.to_([qkv])\.(\w+)", r"\1.attn.qkv.\3", r"\2"),
        Rule(_BLOCK + r"\.attn\.add_([qkv])_proj\.(\w+)", r"\1.attn.add_qkv.\3", r"\2"),
        Rule(_BLOCK + r"\.attn\.norm_([qk])\.weight", r"\1.attn.norm.weight", r"\2"),
        Rule(_BLOCK + r"\.attn\.norm_added_([qk])\.weight", r"\1.attn.norm_added.weight", r"\2"),
        Rule(_BLOCK + r"\.attn\.to_out\.0\.(\w+)", r"\1.attn.to_out.\2"),
        Rule(_BLOCK + r"\.(img_mlp|txt_mlp)\.net\.0\.proj\.(\w+)", r"\1.\2.up.\3"),
        Rule(_BLOCK + r"\.(img_mlp|txt_mlp)\.net\.2\.(\w+)", r"\1.\2.down.\3"),
        Rule(_BLOCK + r"\.(img_mod|txt_mod)\.1\.(\w+)", r"modulation.\3", r"\1.\2"),
        Rule(r"norm_out\.linear\.(\w+)", r"modulation.\1", "norm_out"),
    )

    def __init__(
        self,
        *,
        od_config: Any = None,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        guidance_embeds: bool = False,
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("guidance_embeds", guidance_embeds),
            ("zero_cond_t", zero_cond_t),
            ("use_additional_t_cond", use_additional_t_cond),
            ("use_layer3d_rope", use_layer3d_rope),
        ):
            if value:
                raise ConfigError(f"transformer/config.json: {name}={value} is not supported yet", field="model")
        dim = num_attention_heads * attention_head_dim
        self.in_channels = in_channels
        self._axes_dim = tuple(axes_dims_rope)
        self.img_in = nn.Linear(in_channels, dim)
        self.txt_norm = RMSNorm(joint_attention_dim)
        self.txt_in = nn.Linear(joint_attention_dim, dim)
        self.time_text_embed = QwenImageTimeEmbedding(dim)
        self.transformer_blocks = nn.ModuleList(
            QwenImageTransformerBlock(dim, num_attention_heads, attention_head_dim) for _ in range(num_layers)
        )
        parts = {f"transformer_blocks.{i}.{mod}": 6 * dim for i in range(num_layers) for mod in ("img_mod", "txt_mod")}
        self.modulation = StackedLinear(dim, {**parts, "norm_out": 2 * dim})
        self._sizes = [12 * dim] * num_layers + [2 * dim]
        self.proj_out = nn.Linear(dim, patch_size * patch_size * (out_channels or in_channels))

    def embed(self, inputs: DiTInputs) -> Streams:
        """See ``DiTModel.embed``."""
        img_tokens, text_tokens = inputs.latents_BSC.shape[1], inputs.text_BTD.shape[1]
        device = inputs.latents_BSC.device
        return Streams(
            img_BSD=self.img_in(inputs.latents_BSC),
            txt_BTD=self.txt_in(self.txt_norm(inputs.text_BTD)),
            modulation_BM=inputs.modulation_BM,
            rope=qwen_image_rope(self._axes_dim, inputs.grid, text_tokens, device),
            attention=joint_metadata(inputs.text_lengths, text_tokens, img_tokens, device),
        )

    def run_blocks(self, streams: Streams) -> Streams:
        """See ``DiTModel.run_blocks``."""
        img, txt, rope = streams.img_BSD, streams.txt_BTD, streams.rope
        *modulations, last = streams.modulation_BM.split(self._sizes, dim=-1)
        for block, modulation in zip(self.transformer_blocks, modulations, strict=True):
            img, txt = block(img, txt, modulation, rope.img, rope.txt, streams.attention)
        return Streams(img, txt, last, rope, streams.attention)

    def head(self, streams: Streams) -> torch.Tensor:
        """See ``DiTModel.head``."""
        scale, shift = streams.modulation_BM.unsqueeze(1).chunk(2, dim=-1)
        out: torch.Tensor = self.proj_out(modulated_norm(streams.img_BSD, scale, shift))
        return out

    def time_embedding(
        self, timesteps_N: torch.Tensor, pooled_BD: torch.Tensor | None, guidance_B: torch.Tensor | None
    ) -> torch.Tensor:
        """See ``DiTModel.time_embedding``: the timestep alone, the same for every picture."""
        out: torch.Tensor = self.time_text_embed(timesteps_N, self.img_in.weight.dtype)
        return out[:, None]

    def scale_columns(self) -> torch.Tensor:
        """See ``DiTModel.scale_columns``: vectors 1 and 4 of six, 0 of the last two."""
        rows = [False, True, False, False, True, False] * (2 * len(self.transformer_blocks)) + [True, False]
        return torch.tensor(rows).repeat_interleave(self.img_in.out_features)
