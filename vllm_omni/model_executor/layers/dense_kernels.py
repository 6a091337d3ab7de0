"""Triton kernels for dense decoder layers that see one token a row: a code predictor's passes on a GPU.

At one to a few dozen rows a layer is bound by reading its weights and by the gaps between kernels. Each layer is five
kernels here (in plain PyTorch about nineteen): norms, residuals and activations are computed inside the products that
need them (``product_kernels``), and attention with its norm, rotation and cache is one kernel. Each starts before the
one in front of it ends where the GPU can do that. Sums are float32, results of the model's type. Widths are multiples
of 16 and heads powers of two. Imported only where there is a GPU.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from vllm_omni.model_executor.layers.dense import DenseLayer, DenseSpec, rope_table
from vllm_omni.model_executor.layers.overlap import announce, checked_overlap, follow, overlap, repeats
from vllm_omni.model_executor.layers.product_kernels import product

Rope = tuple[torch.Tensor, ...]
ATTENTION_WARPS = 2
"""Warps of attention of one row and key head."""
CHOOSE_WARPS = 8
"""Warps that choose a row's code."""
CHOOSE_WAYS = 4
"""Parts into which a search for a limit cuts its range at a time; a power of two."""
CHECKED = (1, 8, 32)
"""Batches that ``check`` runs: of one and of two rows each, all plans for products."""


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
    launch_pdl: tl.constexpr,
):
    """Attention of T new tokens of one row and one key head: norm, rotate, write the cache, attend to all so far.

    ``past`` is [2, rows, KV, LENGTH, D]; ``start`` tokens are in it.
    """
    announce(launch_pdl)
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, D)
    turned = (d + D // 2) % D
    place = tl.arange(0, BLOCK)
    width: tl.constexpr = (HEADS + 2 * KV) * D
    cache = past_ptr + (row * KV + head) * LENGTH * D + place[:, None] * D + d[None, :]
    known = (place < start)[:, None]
    follow(launch_pdl)
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


@triton.jit
def _rounds(span, ROUNDS: tl.constexpr, WAYS: tl.constexpr):
    """Searches by WAYS in a row that find one of ``span`` numbers, and the size of a way of the first of them."""
    rounds = (span * 0 + 1).to(tl.int32)
    step = span * 0 + 1
    for _ in tl.static_range(ROUNDS - 1):
        more = step * WAYS < span
        rounds += more.to(tl.int32)
        step = tl.where(more, step * WAYS, step)
    return rounds, step


@triton.jit
def _likeliest(key, low, high, top_k, ROUNDS: tl.constexpr, WAYS: tl.constexpr):
    """The largest number that ``top_k`` keys reach, given that as many reach ``low`` and fewer reach ``high``."""
    way = 1 + tl.arange(0, WAYS)
    rounds, step = _rounds(high - low, ROUNDS, WAYS)
    for _ in range(rounds):
        reached = tl.sum((key[:, None] >= (low + step * way)[None, :]).to(tl.int32), axis=0)
        low += step * tl.sum((reached >= top_k).to(tl.int32), axis=0)
        step = step // WAYS
    return low


@triton.jit
def _nucleus(key, probs, low, high, limit, ROUNDS: tl.constexpr, WAYS: tl.constexpr):
    """The smallest number above which there is less than ``limit``, given that this holds for ``high``, not ``low``."""
    way = 1 + tl.arange(0, WAYS)
    rounds, step = _rounds(high - low, ROUNDS, WAYS)
    for _ in range(rounds):
        above = tl.sum(tl.where(key[:, None] > (low + step * way)[None, :], probs[:, None], 0.0), axis=0)
        low += step * tl.sum((above >= limit).to(tl.int32), axis=0)
        step = step // WAYS
    return low + 1


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
    PARTS: tl.constexpr,
    ROUNDS: tl.constexpr,
    WAYS: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    """One code of one row, its embedding as the next input, and the sum of the embeddings so far.

    The TOP_K likeliest and of them those within ``top_p`` are found by searches over the logits' bits: 16 STEPS for
    logits that were 16-bit numbers, 32 for float32. The first starts at the least of the largest keys of PARTS parts,
    which PARTS keys reach; PARTS is no less than TOP_K.
    """
    announce(launch_pdl)
    row = tl.program_id(0)
    v = tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    follow(launch_pdl)
    logits = tl.load(logits_ptr + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    noise = tl.load(noise_ptr + row * noise_step + group * V + v, mask=v < V, other=1.0)
    greedy = tl.load(greedy_ptr + row) != 0
    total = tl.load(total_ptr + row * C + c, mask=inside, other=0.0)
    bits = logits.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - STEPS)  # ordered as the logits are
    if STEPS == 32:
        key = key.to(tl.int64)  # sums of two of them must fit
    probs = tl.exp(logits - tl.max(logits, axis=0))
    largest = tl.max(tl.reshape(key, (PARTS, BLOCK // PARTS)), axis=1)
    top = tl.max(largest, axis=0)
    low = _likeliest(key, tl.min(largest, axis=0), top + 1, TOP_K, ROUNDS, WAYS)
    limit = top_p * tl.sum(tl.where(key >= low, probs, 0.0), axis=0)
    high = _nucleus(key, probs, low - 1, top, limit, ROUNDS, WAYS)
    drawn = tl.where((key >= high) & (probs > 0), probs / noise, -1.0)
    code = tl.argmax(tl.where(greedy, logits, drawn), axis=0).to(tl.int64)
    embedded = tl.load(table_ptr + code * C + c, mask=inside, other=0.0)
    tl.store(next_ptr + row * C + c, embedded, mask=inside)
    tl.store(total_ptr + row * C + c, total + embedded.to(tl.float32), mask=inside)
    tl.store(codes_ptr + row * codes_step + group, code)


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
        launch_pdl=overlap(qkv.device),
        num_warps=ATTENTION_WARPS,
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
    top_k, block = min(top_k, size), triton.next_power_of_2(size)
    steps = 32 if logits.dtype == torch.float32 else 16
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
        TOP_K=top_k,
        V=size,
        BLOCK=block,
        C=table.shape[1],
        BLOCK_C=triton.next_power_of_2(table.shape[1]),
        STEPS=steps,
        PARTS=triton.next_power_of_2(top_k),
        ROUNDS=steps // (CHOOSE_WAYS.bit_length() - 1) + 1,
        WAYS=CHOOSE_WAYS,
        launch_pdl=overlap(logits.device),
        num_warps=CHOOSE_WARPS,
    )
    return out


def check(spec: DenseSpec, vocabulary: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Run a layer's kernels on random numbers; what is wrong with them on this machine, or None.

    Where the GPU can, kernels start early from now on, if that gives the same.
    """
    return checked_overlap(device, lambda: _check(spec, vocabulary, device, dtype))


def _check(spec: DenseSpec, vocabulary: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels as they are set up now, or None."""
    layer = DenseLayer(spec).to(device, dtype)
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else parameter.data.fill_(1.1)
    table = torch.randn(vocabulary, spec.hidden_size, device=device, dtype=dtype)
    try:
        for batch in CHECKED if device.type == "cuda" else CHECKED[:1]:  # interpreted kernels are slow
            wrong = _check_batch(batch, layer, table)
            if wrong is not None:
                return f"{wrong}, batch {batch}"
    except (TritonError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _check_batch(batch: int, layer: DenseLayer, table: torch.Tensor) -> str | None:
    """What is wrong with the kernels for this batch, or None: the layer three times over, and a choice."""
    spec = layer.self_attn.spec
    (vocabulary, size), device = table.shape, table.device
    rope = rope_table(4, spec, device, torch.float32)
    inputs = torch.randn(2, batch, 3, size, device=device, dtype=table.dtype)
    x = inputs[0].clone()
    greedy = torch.ones(batch, dtype=torch.bool, device=device)
    noise = torch.ones(batch, 1, vocabulary, device=device)

    def run(fused: bool) -> torch.Tensor:
        """Two tokens of each row, then one; [3, batch * 3, size]."""
        past = x.new_zeros(3, 2, batch, spec.num_kv_heads, 4, spec.head_dim)
        y, found = x, []
        for number in range(3):
            parts = []
            for start, rows in ((0, y[:, :2]), (2, y[:, 2:])):
                if fused:
                    flat = rows.contiguous().view(-1, size)
                    part = run_layer(layer, flat, rope, past[number], start, rows.shape[1]).view(rows.shape)
                else:
                    low = tuple(values[start : start + rows.shape[1]].to(x.dtype) for values in rope)
                    part = layer(rows, low, past=past[number], start=start)
                parts.append(part)
            y = torch.cat(parts, dim=1)
            found.append(y.view(-1, size))
        return torch.stack(found)

    def chosen() -> tuple[torch.Tensor, torch.Tensor]:
        logits = product(x[:, 0], table)
        codes, total = (
            torch.zeros_like(logits[:, :1], dtype=torch.int64),
            torch.zeros_like(x[:, 0], dtype=torch.float32),
        )
        return logits, choose(logits, greedy, noise, 0, table, codes, total, 50, 0.8)

    want, got = run(False).float(), run(True).float()
    off = float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
    if not off <= 0.03:
        return f"layers are off by {off:g} of their result"
    logits, embedded = chosen()
    if not torch.equal(embedded, table[logits.argmax(-1)]):
        return "wrong codes are chosen"
    if device.type == "cuda" and not repeats(lambda: (run(True), *chosen()), x, inputs):
        return "a graph of them gives something else each time"
    return None


def run_layer(layer: DenseLayer, x: torch.Tensor, rope: Rope, past: torch.Tensor, start: int, new: int) -> torch.Tensor:
    """``DenseLayer`` of ``new`` tokens of every row, [rows * new, hidden]; ``rope`` is the whole table in float32."""
    attention, mlp, eps = layer.self_attn, layer.mlp, layer.self_attn.spec.eps
    qkv = product(x, attention.qkv_proj.weight, norm=layer.input_layernorm.weight, eps=eps)
    mixed = attend(qkv, attention.spec, attention.qk_norm, rope, past, start, new)
    x = product(mixed, attention.o_proj.weight, residual=x)
    norm = layer.post_attention_layernorm.weight
    inner = product(x, mlp.gate_up_proj.weight, norm=norm, eps=eps, gated=True)
    return product(inner, mlp.down_proj.weight, residual=x)
