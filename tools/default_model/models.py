"""The sizes of the model and the diffusers and transformers classes it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


@dataclass(frozen=True)
class Layout:
    """Sizes of the parts that belong together: how fine the autoencoder's latents are, and the transformer on them."""

    vae: dict[str, Any]
    """Configuration of the AutoencoderKLQwenImage."""
    transformer: dict[str, Any]
    """Configuration of the QwenImageTransformer2DModel."""
    shift: float
    """base_shift of the scheduler: the more latents a picture has, the more noise hides it."""

    @property
    def cell(self) -> int:
        """Side of the square of pixels that one token of the transformer stands for."""
        return int(2 ** (1 + len(self.vae["temperal_downsample"])))

    @property
    def width(self) -> int:
        """Values per packed token."""
        return int(self.vae["z_dim"] * 4)

    def patches(self, canvas: tuple[int, int]) -> int:
        """Tokens of a picture of that width and height."""
        return (canvas[0] // self.cell) * (canvas[1] // self.cell)

    @property
    def scheduler(self) -> dict[str, Any]:
        """Configuration of the FlowMatchEulerDiscreteScheduler."""
        return {**SCHEDULER, "base_shift": self.shift, "max_shift": max(self.shift, SCHEDULER["max_shift"])}


def _vae(base: int, latents: int, multipliers: list[int]) -> dict[str, Any]:
    return {
        "base_dim": base,
        "z_dim": latents,
        "dim_mult": multipliers,
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [False] * (len(multipliers) - 1),
        "dropout": 0.0,
    }


def _transformer(latents: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "patch_size": 2,
        "in_channels": latents * 4,
        "out_channels": latents,
        "num_layers": layers,
        "attention_head_dim": 32,
        "num_attention_heads": heads,
        "joint_attention_dim": 192,
        "guidance_embeds": False,
        "axes_dims_rope": [8, 12, 12],
    }


LAYOUTS = {
    "fine": Layout(_vae(16, 8, [1, 2, 3]), _transformer(8, 8, 5), 0.8),
    "coarse": Layout(
        {**_vae(16, 16, [1, 2, 3, 3]), "temperal_downsample": [False, True, True]}, _transformer(16, 5, 6), 0.5
    ),
}
"""fine: a token is 8x8 pixels, 256 of them. coarse: 16x16 pixels, 64 of them, as the released model has them."""

TEXT: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "mrope_section": [4, 6, 6],
}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 112,
    "fullatt_block_indexes": [0],
}
SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}


def make_vae(layout: Layout) -> AutoencoderKLQwenImage:
    """A new autoencoder with zero in the temporal weights that a single picture never uses."""
    vae = AutoencoderKLQwenImage(**layout.vae)
    for name, parameter in vae.named_parameters():
        if "time_conv" in name:
            nn.init.zeros_(parameter)
    return vae


def is_unused(transformer: QwenImageTransformer2DModel, name: str) -> bool:
    """Whether a parameter makes only the last block's text, which goes nowhere. It stays in the layout, at zero."""
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}."
    return name.startswith((f"{last}txt_mlp.", f"{last}attn.to_add_out."))


def make_transformer(layout: Layout, **sizes: Any) -> QwenImageTransformer2DModel:
    """A new transformer, started as diffusion transformers are: modulation and output at zero."""
    transformer = QwenImageTransformer2DModel(**{**layout.transformer, **sizes})
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.img_mod[1].weight)
        nn.init.zeros_(block.txt_mod[1].weight)
    for name, parameter in transformer.named_parameters():
        if is_unused(transformer, name):
            nn.init.zeros_(parameter)
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def make_text_encoder(vocabulary: int, specials: dict[str, int], **sizes: Any) -> Qwen2_5_VLForConditionalGeneration:
    """A new text encoder; specials maps the special tokens to their ids."""
    text = {**TEXT, **sizes}
    theta, section = text.pop("rope_theta"), text.pop("mrope_section")
    config = Qwen2_5_VLConfig(
        text_config={
            **text,
            "vocab_size": vocabulary,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": section},
            "bos_token_id": specials["<|endoftext|>"],
            "eos_token_id": specials["<|im_end|>"],
            "tie_word_embeddings": True,
        },
        vision_config={**VISION, "out_hidden_size": text["hidden_size"]},
        image_token_id=specials["<|image_pad|>"],
        video_token_id=specials["<|video_pad|>"],
        vision_start_token_id=specials["<|vision_start|>"],
        vision_end_token_id=specials["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


class JointAttention:
    """The transformer's attention with real-valued rotation, which compiles into few kernels.

    The same mathematics as the processor that diffusers installs; the rotary tables are (cos, sin) pairs of shape
    (S, 1, D) with the values of the complex tables repeated for both members of a pair.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend over text and image together; returns the image's and the text's part, each (B, S, dim)."""
        heads, words = attn.heads, encoder_hidden_states.shape[1]
        (cos, sin) = image_rotary_emb
        image = [layer(hidden_states).unflatten(-1, (heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = [layer(encoder_hidden_states).unflatten(-1, (heads, -1)) for layer in added]
        q = torch.cat([attn.norm_added_q(text[0]), attn.norm_q(image[0])], dim=1)
        k = torch.cat([attn.norm_added_k(text[1]), attn.norm_k(image[1])], dim=1)
        v = torch.cat([text[2], image[2]], dim=1)
        out = functional.scaled_dot_product_attention(
            _rotate(q, cos, sin).transpose(1, 2),
            _rotate(k, cos, sin).transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=encoder_hidden_states_mask,
        )
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return attn.to_out[0](out[:, words:]), attn.to_add_out(out[:, :words])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.float().unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


def rotary_tables(
    transformer: QwenImageTransformer2DModel, rows: int, columns: int, words: int, patches: int
) -> tuple[Tensor, ...]:
    """(cos, sin) for words and for rows * columns patches padded to `patches`, each (words + patches, 1, head_dim)."""
    device = next(transformer.parameters()).device
    image, text = transformer.pos_embed([[(1, rows, columns)]], max_txt_seq_len=words, device=device)
    padding = torch.ones(patches - rows * columns, image.shape[1], dtype=image.dtype, device=image.device)
    table = torch.cat([text, image, padding]).to(device)
    return tuple(part.repeat_interleave(2, dim=-1)[:, None].float().contiguous() for part in (table.real, table.imag))


def encode_text(text_encoder: Qwen2_5_VLForConditionalGeneration, ids: Tensor) -> Tensor:
    """Last hidden states (B, S, hidden) of right-padded token rows; causal, so padding changes nothing before it."""
    model = text_encoder.model.language_model
    hidden = model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
    tables = model.rotary_emb(hidden, positions)
    for layer in model.layers:
        out = layer(hidden, attention_mask=None, position_embeddings=tables, use_cache=False)
        hidden = out[0] if isinstance(out, tuple) else out
    return model.norm(hidden)


def velocity(
    transformer: QwenImageTransformer2DModel, latents: Tensor, text: Tensor, mask: Tensor, time: Tensor, tables: Any
) -> Tensor:
    """The transformer's forward for training, with tables and mask made once.

    Args:
        transformer: with JointAttention as its attention processor.
        latents: packed noisy latents, (B, rows * columns, 64).
        text: features of the caption's tokens, (B, words, joint_attention_dim).
        mask: which of words + rows * columns tokens are real, (B, 1, 1, S), bool.
        time: 0 (clean) to 1 (noise), (B,).
        tables: from `rotary_tables`.
    """
    image = transformer.img_in(latents)
    words = transformer.txt_in(transformer.txt_norm(text))
    embedded = transformer.time_text_embed(time.to(image.dtype), image)
    for block in transformer.transformer_blocks:
        words, image = block(
            hidden_states=image,
            encoder_hidden_states=words,
            encoder_hidden_states_mask=mask,
            temb=embedded,
            image_rotary_emb=tables,
        )
    return transformer.proj_out(transformer.norm_out(image, embedded))
