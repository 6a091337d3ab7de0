"""Triton kernels for dense decoder layers that see one token a row: a code predictor's passes on a GPU.

At one to a few dozen rows a layer is bound by reading its weights and by the gaps between kernels. Each layer is five
kernels here (in plain PyTorch about nineteen): norms, residuals and activations are computed inside the products that
need them, and attention with its norm, rotation and cache is one kernel. Sums are float32, results of the model's type.
Widths are multiples of 16 and heads powers of two. Imported only where there is a GPU.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from vllm_omni.model_executor.layers.dense import DenseLayer, DenseSpec, rope_table

Rope = tuple[torch.Tensor, ...]
PROGRAMS = 128
"""Programs of a product."""


@triton.jit(do_not_specialize=["rows"])
def _product(
    x_ptr,
    w_ptr,
    norm_ptr,
    res_ptr,
    out_ptr,
    rows,
    row_step,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OWN: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = x @ w.T of OWN columns. NORM: of rms-normalised x. GATED: silu(first half) * second half."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    column = tl.arange(0, BN)
    n = tl.program_id(0) * OWN + column
    k = tl.arange(0, BK)
    live = m < rows
    own = (column < OWN)[:, None]
    x_at = x_ptr + m[:, None] * row_step + k[None, :]
    w_at = w_ptr + n[:, None] * K + k[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    up = tl.zeros((BM, BN), dtype=tl.float32)
    squares = tl.zeros((BM,), dtype=tl.float32)
    for start in range(0, K, BK):
        x = tl.load(x_at + start, mask=live[:, None], other=0.0)
        if NORM:
            x32 = x.to(tl.float32)
            squares += tl.sum(x32 * x32, axis=1)
            x = (x32 * tl.load(norm_ptr + start + k).to(tl.float32)[None, :]).to(x.dtype)
        acc = tl.dot(x, tl.trans(tl.load(w_at + start, mask=own, other=0.0)), acc, input_precision=PRECISION)
        if GATED:
            second = tl.load(w_at + N * K + start, mask=own, other=0.0)
            up = tl.dot(x, tl.trans(second), up, input_precision=PRECISION)
    if NORM:
        scale = tl.rsqrt(squares / K + eps)[:, None]
        acc = acc * scale
        up = up * scale
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    at = m[:, None] * N + n[None, :]
    inside = live[:, None] & (column < OWN)[None, :]
    if RESIDUAL:
        acc += tl.load(res_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rotated(at, gain_at, d, turned, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr):
    """A head's vector, RMS-normalised with its gains if NORM, and rotated (half-rotate form)."""
    x, x_turned = tl.load(at + d).to(tl.float32), tl.load(at + turned).to(tl.float32)
    if NORM:
        shrink = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        x = x * shrink * tl.load(gain_at + d).to(tl.float32)
        x_turned = x_turned * shrink * tl.load(gain_at + turned).to(tl.float32)
    return x * cos + x_turned * sin


@triton.jit(do_not_specialize=["start"])
def _attention(
    qkv_ptr,
    gain_ptr,
    cos_ptr,
    sin_ptr,
    past_ptr,
    out_ptr,
    start,
    past_half,
    eps,
    scale,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):
    """Attention of T new tokens of one row and one key head: norm, rotate, write the cache, attend to all so far.

    ``past`` is [2, rows, KV, LENGTH, D]; ``start`` tokens are in it.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, D)
    turned = (d + D // 2) % D
    place = tl.arange(0, BLOCK)
    width: tl.constexpr = (HEADS + 2 * KV) * D
    cache = past_ptr + (row * KV + head) * LENGTH * D + place[:, None] * D + d[None, :]
    known = (place < start)[:, None]
    keys = tl.load(cache, mask=known, other=0.0).to(tl.float32)
    values = tl.load(cache + past_half, mask=known, other=0.0).to(tl.float32)
    for t in tl.static_range(T):
        base = qkv_ptr + (row * T + t) * width
        cos = tl.load(cos_ptr + (start + t) * D + d).to(tl.float32)
        sin = tl.load(sin_ptr + (start + t) * D + d).to(tl.float32)
        k_at = base + (HEADS + head) * D
        k = _rotated(k_at, gain_ptr + (HEADS + head) * D, d, turned, cos, sin, eps, D, NORM)
        v = tl.load(base + (HEADS + KV + head) * D + d).to(tl.float32)
        tl.store(past_ptr + ((row * KV + head) * LENGTH + start + t) * D + d, k.to(past_ptr.dtype.element_ty))
        tl.store(
            past_ptr + past_half + ((row * KV + head) * LENGTH + start + t) * D + d, v.to(past_ptr.dtype.element_ty)
        )
        here = (place == start + t)[:, None]
        keys = tl.where(here, k[None, :], keys)
        values = tl.where(here, v[None, :], values)
        for group in tl.static_range(HEADS // KV):
            at = head * (HEADS // KV) + group
            q = _rotated(base + at * D, gain_ptr + at * D, d, turned, cos, sin, eps, D, NORM) * scale
            scores = tl.where(place <= start + t, tl.sum(keys * q[None, :], axis=1), float("-inf"))
            weights = tl.exp(scores - tl.max(scores, axis=0))
            weights = weights / tl.sum(weights, axis=0)
            out = tl.sum(values * weights[:, None], axis=0)
            tl.store(out_ptr + (row * T + t) * HEADS * D + at * D + d, out.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["group"])
def _choose(
    logits_ptr,
    greedy_ptr,
    noise_ptr,
    table_ptr,
    codes_ptr,
    next_ptr,
    total_ptr,
    group,
    codes_step,
    noise_step,
    top_p,
    TOP_K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One code of one row, its embedding as the next input, and the sum of the embeddings so far.

    The TOP_K likeliest and of them those within ``top_p`` are found by halving over the logits' bits: 16 STEPS for
    logits that were 16-bit numbers, 32 for float32.
    """
    row = tl.program_id(0)
    v = tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    bits = logits.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - STEPS)  # ordered as the logits are
    if STEPS == 32:
        key = key.to(tl.int64)  # sums of two of them must fit
    top = tl.max(key, axis=0)
    low, high = tl.min(key, axis=0), top + 1
    for _ in range(STEPS + 1):  # low: the largest number that TOP_K keys reach
        middle = (low + high) >> 1
        enough = tl.sum((key >= middle).to(tl.int32), axis=0) >= TOP_K
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    probs = tl.where((key >= low) & (v < V), tl.exp(logits - tl.max(logits, axis=0)), 0.0)
    limit = top_p * tl.sum(probs, axis=0)
    low, high = low - 1, top
    for _ in range(STEPS + 1):  # high: the smallest number above which there is less than the limit
        middle = (low + high) >> 1
        less = (tl.sum(tl.where(key > middle, probs, 0.0), axis=0) < limit) & (middle > low)
        high = tl.where(less, middle, high)
        low = tl.where(less, low, middle)
    noise = tl.load(noise_ptr + row * noise_step + group * V + v, mask=v < V, other=1.0)
    drawn = tl.argmax(tl.where((key >= high) & (probs > 0), probs / noise, -1.0), axis=0)
    best = tl.argmax(tl.where(v < V, logits, float("-inf")), axis=0)
    code = tl.where(tl.load(greedy_ptr + row) != 0, best, drawn).to(tl.int64)
    tl.store(codes_ptr + row * codes_step + group, code)
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    embedded = tl.load(table_ptr + code * C + c, mask=inside, other=0.0)
    tl.store(next_ptr + row * C + c, embedded, mask=inside)
    total = tl.load(total_ptr + row * C + c, mask=inside, other=0.0)
    tl.store(total_ptr + row * C + c, total + embedded.to(tl.float32), mask=inside)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """Rows [R, K] times ``weight`` [N, K]: [R, N].

    Args:
        x: rows; the last dimension is dense, rows may be apart.
        weight: of a linear layer without bias.
        norm: gains of an RMS norm of x.
        eps: of the norm.
        residual: [R, N], added.
        gated: the result is silu(first N / 2) * (last N / 2): [R, N / 2].
    """
    rows, size = x.shape
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    block_m = 16 if rows <= 16 else 32
    # As many programs as the GPU has processors, about: each owns the columns that make it so.
    own = columns // PROGRAMS if columns % PROGRAMS == 0 and 8 <= columns // PROGRAMS <= 32 else 16
    block_n = max(16, triton.next_power_of_2(own))
    block_k = next(b for b in (256, 128, 64, 32, 16) if size % b == 0)
    out = torch.empty(rows, columns, device=x.device, dtype=x.dtype)
    _product[(columns // own, triton.cdiv(rows, block_m))](
        x,
        weight,
        x if norm is None else norm,
        x if residual is None else residual,
        out,
        rows,
        x.stride(0),
        eps,
        N=columns,
        K=size,
        BM=block_m,
        BN=block_n,
        BK=block_k,
        OWN=own,
        NORM=norm is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=2 if x.dtype == torch.float32 else 4,
    )
    return out


def attend(
    qkv: torch.Tensor, spec: DenseSpec, gains: torch.Tensor | None, rope: Rope, past: torch.Tensor, start: int, new: int
) -> torch.Tensor:
    """Attention of ``new`` tokens a row, [rows * new, heads * head_dim]; ``past`` [2, rows, kv, length, head_dim]."""
    rows, length = past.shape[1], past.shape[3]
    out = torch.empty(rows * new, spec.num_heads * spec.head_dim, device=qkv.device, dtype=qkv.dtype)
    _attention[(rows, spec.num_kv_heads)](
        qkv,
        qkv if gains is None else gains,
        rope[0],
        rope[1],
        past,
        out,
        start,
        past.stride(0),
        spec.eps,
        spec.head_dim**-0.5,
        T=new,
        HEADS=spec.num_heads,
        KV=spec.num_kv_heads,
        D=spec.head_dim,
        LENGTH=length,
        BLOCK=triton.next_power_of_2(length),
        NORM=gains is not None,
        num_warps=4,
    )
    return out


def choose(
    logits: torch.Tensor,
    greedy: torch.Tensor,
    noise: torch.Tensor,
    group: int,
    table: torch.Tensor,
    codes: torch.Tensor,
    total: torch.Tensor,
    top_k: int,
    top_p: float,
) -> torch.Tensor:
    """Sample code ``group`` of every row into ``codes`` [R, groups]; its embedding [R, C] is returned and added to
    ``total`` [R, C] float32. ``noise`` is [R, groups, V] float32."""
    rows, size = logits.shape
    out = torch.empty(rows, table.shape[1], device=logits.device, dtype=table.dtype)
    _choose[(rows,)](
        logits,
        greedy,
        noise,
        table,
        codes,
        out,
        total,
        group,
        codes.stride(0),
        noise.stride(0),
        top_p,
        TOP_K=min(top_k, size),
        V=size,
        BLOCK=triton.next_power_of_2(size),
        C=table.shape[1],
        BLOCK_C=triton.next_power_of_2(table.shape[1]),
        STEPS=32 if logits.dtype == torch.float32 else 16,
        num_warps=8,
    )
    return out


def check(spec: DenseSpec, vocabulary: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Run a layer's kernels on random numbers; what is wrong with them on this machine, or None."""
    layer = DenseLayer(spec).to(device, dtype)
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else parameter.data.fill_(1.1)
    rope = rope_table(4, spec, device, torch.float32)
    low = tuple(table.to(dtype) for table in rope)
    x = torch.randn(6, spec.hidden_size, device=device, dtype=dtype)
    pasts = [x.new_zeros(2, 2, spec.num_kv_heads, 4, spec.head_dim) for _ in range(2)]
    logits = torch.randn(2, vocabulary, device=device, dtype=dtype)
    greedy, noise = torch.tensor([True, False], device=device), torch.ones(2, 1, vocabulary, device=device)
    codes, total = torch.zeros(2, 1, dtype=torch.int64, device=device), torch.zeros(2, 16, device=device)
    table = torch.randn(vocabulary, 16, device=device, dtype=dtype)
    want, got = [], []
    try:
        for start, rows in ((0, x[:4]), (2, x[4:])):
            new = rows.shape[0] // 2
            part = tuple(values[start : start + new] for values in low)
            want.append(layer(rows.view(2, new, -1), part, past=pasts[0], start=start).reshape(2 * new, -1))
            got.append(run_layer(layer, rows, rope, pasts[1], start, new))
        choose(logits, greedy, noise, 0, table, codes, total, 50, 0.8)
        off = float((torch.cat(got) - torch.cat(want)).float().abs().max())
    except (TritonError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    if not off <= 0.1:
        return f"a layer is off by {off:g}"
    # With equal noise the likeliest is drawn.
    return None if codes[:, 0].tolist() == logits.argmax(-1).tolist() else "wrong codes are chosen"


def run_layer(layer: DenseLayer, x: torch.Tensor, rope: Rope, past: torch.Tensor, start: int, new: int) -> torch.Tensor:
    """``DenseLayer`` of ``new`` tokens of every row, [rows * new, hidden]; ``rope`` is the whole table in float32."""
    attention, mlp, eps = layer.self_attn, layer.mlp, layer.self_attn.spec.eps
    qkv = product(x, attention.qkv_proj.weight, norm=layer.input_layernorm.weight, eps=eps)
    mixed = attend(qkv, attention.spec, attention.qk_norm, rope, past, start, new)
    x = product(mixed, attention.o_proj.weight, residual=x)
    norm = layer.post_attention_layernorm.weight
    inner = product(x, mlp.gate_up_proj.weight, norm=norm, eps=eps, gated=True)
    return product(inner, mlp.down_proj.weight, residual=x)
