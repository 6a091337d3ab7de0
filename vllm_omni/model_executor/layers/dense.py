"""A dense decoder layer for short sequences that live outside the paged KV cache.

Code predictors (16 positions, run anew for every audio frame) and the transformers inside vocoders are made of it.
Tensors are dense [B, T, ...], shapes are static for given B and T, and nothing reads a value on the host, so that a run
can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

_STACKED = {
    "q_proj.": ("qkv_proj.", 0),
    "k_proj.": ("qkv_proj.", 1),
    "v_proj.": ("qkv_proj.", 2),
    "gate_proj.": ("gate_up_proj.", 0),
    "up_proj.": ("gate_up_proj.", 1),
    "q_norm.weight": ("qk_norm", 0),
    "k_norm.weight": ("qk_norm", 1),
}


@dataclass(frozen=True)
class DenseSpec:
    """Sizes and options of a stack of dense layers."""

    hidden_size: int
    """Width of the residual stream."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; divides ``num_heads``."""
    head_dim: int
    """Width of one head."""
    intermediate_size: int
    """Width inside the SwiGLU."""
    eps: float
    """Epsilon of the RMS norms."""
    rope_theta: float
    """Base of the rotary embedding (half-rotate form)."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalised per head."""
    layer_scale: bool = False
    """Whether both branches are multiplied by a learnt vector."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerScale(nn.Module):
    """Multiplies by a learnt vector (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def rope_table(length: int, spec: DenseSpec, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Cosines, and sines with the sign of the half-rotate form, [length, 1, head_dim] of positions ``0 .. length``."""
    half = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=device) / spec.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), spec.rope_theta**-half)
    sines = angles.sin()
    table = torch.cat([angles, angles], dim=-1).cos(), torch.cat([-sines, sines], dim=-1)
    return tuple(part[:, None].to(dtype) for part in table)


class DenseAttention(nn.Module):
    """Grouped-query self-attention with rotary positions and optional q/k norm.

    ``qk_norm`` holds the gain of every query and key head: a checkpoint has one vector for all query heads and one for
    all key heads. So both are normalised and rotated together.
    """

    def __init__(self, spec: DenseSpec) -> None:
        super().__init__()
        self.spec = spec
        self.heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
        self.sizes = [n * spec.head_dim for n in self.heads]
        self.qkv_proj = nn.Linear(spec.hidden_size, sum(self.sizes), bias=False)
        self.o_proj = nn.Linear(self.sizes[0], spec.hidden_size, bias=False)
        self.qk_norm = nn.Parameter(torch.ones(sum(self.heads[:2]), spec.head_dim)) if spec.qk_norm else None

    def forward(
        self,
        x_BTC: torch.Tensor,
        rope: tuple[torch.Tensor, ...],
        mask: torch.Tensor | None = None,
        past: torch.Tensor | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x_BTC: [B, T, hidden].
            rope: ``rope_table`` rows of the T positions.
            mask: [T, T] bool, true where attention is allowed; ``None`` is causal.
            past: keys and values [2, B, kv heads, at least start + T, head_dim]; written at ``start``.
            start: positions of ``past`` that are already filled; T is 1 unless it is 0.
        """
        batch, length, _ = x_BTC.shape
        qkv = self.qkv_proj(x_BTC).view(batch, length, -1, self.spec.head_dim)
        qk, v = qkv.split([sum(self.heads[:2]), self.heads[2]], dim=2)
        if self.qk_norm is not None:
            qk = F.rms_norm(qk, (self.spec.head_dim,), None, self.spec.eps) * self.qk_norm
        qk = torch.addcmul(qk * rope[0], qk.roll(self.spec.head_dim // 2, -1), rope[1])
        q, k = (part.transpose(1, 2) for part in qk.split(self.heads[:2], dim=2))
        v = v.transpose(1, 2)
        if past is not None:
            end = start + length
            past[0, :, :, start:end] = k
            past[1, :, :, start:end] = v
            k, v = past[0, :, :, :end], past[1, :, :, :end]
        grouped = self.spec.num_heads != self.spec.num_kv_heads
        causal = mask is None and length > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DenseLayer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, spec: DenseSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.eps)
        self.self_attn = DenseAttention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.eps)
        self.mlp = SwiGLU(spec.hidden_size, spec.intermediate_size)
        self.self_attn_layer_scale = LayerScale(spec.hidden_size) if spec.layer_scale else nn.Identity()
        self.mlp_layer_scale = LayerScale(spec.hidden_size) if spec.layer_scale else nn.Identity()

    def forward(
        self,
        x_BTC: torch.Tensor,
        rope: tuple[torch.Tensor, ...],
        mask: torch.Tensor | None = None,
        past: torch.Tensor | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """One layer; the arguments are those of ``DenseAttention``."""
        attended = self.self_attn(self.input_layernorm(x_BTC), rope, mask, past, start)
        x_BTC = x_BTC + self.self_attn_layer_scale(attended)
        return x_BTC + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x_BTC)))


def sliding_causal_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """[length, length] bool: position i sees the ``window`` positions up to and with itself."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - window)


def load_dense_weights(module: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Copy checkpoint tensors into ``module``, joining q, k, v and gate, up and the norms of q, k.

    Args:
        module: names of its parameters equal the checkpoint's but for the joined projections.
        weights: (name, tensor) without the module's prefix.

    Returns:
        Names of the parameters that were filled completely.

    Raises:
        ValueError: a tensor has no parameter or another shape.
    """
    params = dict(module.named_parameters())
    norms = {name for name in params if name.endswith(".qk_norm")}
    parts: dict[str, set[int]] = {}
    for name, tensor in weights:
        target, part = name, 0
        for old, (new, index) in _STACKED.items():
            if f".{old}" in f".{name}":
                target, part = name.replace(old, new), index
        if target not in params:
            raise ValueError(f"checkpoint tensor {name!r} has no parameter in {type(module).__name__}")
        rows = _rows(module, target, part) if target != name else slice(None)
        if target in norms:
            tensor = tensor.expand(rows.stop - rows.start, -1)
        if params[target].data[rows].shape != tensor.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(tensor.shape)}, {tuple(params[target].data[rows].shape)} needed"
            )
        params[target].data[rows].copy_(tensor)
        parts.setdefault(target, set()).add(part)
    return {name for name, got in parts.items() if len(got) == _parts(name)}


def _parts(target: str) -> int:
    """Checkpoint tensors that make up a parameter."""
    stem = target.removesuffix("weight")
    return max(1, sum(f".{stem}".endswith(f".{joined}") for joined, _ in _STACKED.values()))


def _rows(module: nn.Module, target: str, part: int) -> slice:
    """Rows of a joined parameter that hold part number ``part``."""
    owner = module.get_submodule(target.removesuffix(".weight").rpartition(".")[0])
    if isinstance(owner, DenseAttention):
        sizes = owner.heads[:2] if target.endswith(".qk_norm") else owner.sizes
    else:
        assert isinstance(owner, SwiGLU)
        sizes = [owner.down_proj.in_features] * 2
    return slice(sum(sizes[:part]), sum(sizes[: part + 1]))
