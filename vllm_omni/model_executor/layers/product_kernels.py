"""Triton kernels for products of a few rows with a large weight, one kernel after the other on a GPU.

Such a product is bound by reading its weight. Where kernels may start early (``overlap``) it loads its weight into
registers before it waits for the kernel in front.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_omni.model_executor.layers.cuts import Plan
from vllm_omni.model_executor.layers.overlap import announce, checked_overlap, follow, overlap, repeats

PROGRAMS = 128
"""Programs of a product by ``_looped``."""
VECTOR_ROWS = 2
"""Most rows that are multiplied without tensor cores."""


# By (rows at most, columns of the result, length of a row, gated): Qwen3-Omni-30B-A3B on one H200.
PLANS: dict[tuple[int, int, int, bool], Plan] = {
    (1, 1024, 2048, False): Plan("vector", 8, 8, 256),
    (1, 1024, 3072, False): Plan("vector", 4, 4, 256),
    (1, 2048, 1024, False): Plan("vector", 4, 1, 256),
    (1, 3072, 1024, True): Plan("vector", 16, 8, 256),
    (1, 4096, 1024, False): Plan("vector", 16, 8, 256),
    (2, 1024, 2048, False): Plan("vector", 2, 1, 256),
    (2, 1024, 3072, False): Plan("vector", 4, 4, 256),
    (2, 2048, 1024, False): Plan("vector", 4, 1, 256),
    (2, 3072, 1024, True): Plan("vector", 4, 4, 256),
    (2, 4096, 1024, False): Plan("vector", 4, 1, 256),
    (8, 1024, 2048, False): Plan("split", 16, 4, 128),
    (8, 1024, 3072, False): Plan("split", 8, 4, 128),
    (8, 2048, 1024, False): Plan("split", 16, 4, 128),
    (8, 3072, 1024, True): Plan("split", 16, 4, 128),
    (8, 4096, 1024, False): Plan("split", 16, 4, 128),
    (16, 1024, 2048, False): Plan("split", 16, 4, 128),
    (16, 1024, 3072, False): Plan("split", 16, 8, 128),
    (16, 2048, 1024, False): Plan("split", 16, 4, 128),
    (16, 3072, 1024, True): Plan("split", 16, 4, 128),
    (16, 4096, 1024, False): Plan("split", 16, 4, 128),
    (32, 1024, 2048, False): Plan("split", 16, 4, 128),
    (32, 1024, 3072, False): Plan("split", 16, 8, 128),
    (32, 2048, 1024, False): Plan("split", 16, 4, 128),
    (32, 3072, 1024, True): Plan("split", 16, 4, 128),
    (32, 4096, 1024, False): Plan("split", 16, 4, 128),
    (64, 1024, 2048, False): Plan("split", 8, 4, 128),
    (64, 1024, 3072, False): Plan("split", 16, 4, 128),
    (64, 2048, 1024, False): Plan("split", 16, 4, 128),
    (64, 3072, 1024, True): Plan("split", 16, 4, 128),
    (64, 4096, 1024, False): Plan("split", 16, 4, 128),
}
"""Measured plans; sizes that are not here are planned by ``plan``."""


@triton.jit
def _words(pointer):
    """bfloat16 numbers as 32-bit words of two."""
    return pointer.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _halves(words):
    """The two numbers of words as float32."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _finished(acc, up, squares, res_ptr, at, inside, eps, K: tl.constexpr, NORM, GATED, RESIDUAL):
    """Sums of a product with what follows it; ``squares`` fits their shape."""
    if NORM:
        scale = tl.rsqrt(squares / K + eps)
        acc = acc * scale
        up = up * scale
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    if RESIDUAL:
        acc += tl.load(res_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["rows"])
def _looped(
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
    launch_pdl: tl.constexpr,
):
    """out = x @ w.T of OWN columns. NORM: of rms-normalised x. GATED: silu(first half) * second half."""
    announce(launch_pdl)
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
    follow(launch_pdl)
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
    at = m[:, None] * N + n[None, :]
    inside = live[:, None] & (column < OWN)[None, :]
    acc = _finished(acc, up, squares[:, None], res_ptr, at, inside, eps, K, NORM, GATED, RESIDUAL)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _vector(
    x_ptr,
    w_ptr,
    norm_ptr,
    res_ptr,
    out_ptr,
    row_step,
    eps,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    """``_looped`` for a row or two of bfloat16. With BN warps and a BK of 256 each warp sums a row of the weight.

    x, the gains and the squares are [BN, BK / 2] words like the weight, all rows alike: no warp waits for another then.
    Words are taken apart after the wait: before it that would wait for the weight.
    """
    announce(launch_pdl)
    column = tl.arange(0, BN)
    n = tl.program_id(0) * BN + column
    k = tl.arange(0, BK // 2)
    all_k = column[:, None] * 0 + k[None, :]
    w_at = _words(w_ptr) + n[:, None] * (K // 2) + k[None, :]
    weights, seconds, gains = (), (), ()
    for part in tl.static_range(K // BK):
        weights += (tl.load(w_at + part * (BK // 2)),)
        if GATED:
            seconds += (tl.load(w_at + N * (K // 2) + part * (BK // 2)),)
        if NORM:
            gains += (tl.load(_words(norm_ptr) + part * (BK // 2) + all_k),)
    follow(launch_pdl)
    for row in tl.static_range(ROWS):
        acc = tl.zeros((BN, BK // 2), dtype=tl.float32)
        up = tl.zeros((BN, BK // 2), dtype=tl.float32)
        squares = tl.zeros((BN, BK // 2), dtype=tl.float32)
        for part in tl.static_range(K // BK):
            low, high = _halves(tl.load(_words(x_ptr) + row * (row_step // 2) + part * (BK // 2) + all_k))
            if NORM:
                squares += low * low + high * high
                gain_low, gain_high = _halves(gains[part])
                low, high = low * gain_low, high * gain_high
            w_low, w_high = _halves(weights[part])
            acc += w_low * low + w_high * high
            if GATED:
                w_low, w_high = _halves(seconds[part])
                up += w_low * low + w_high * high
        total, above, square = tl.sum(acc, axis=1), tl.sum(up, axis=1), tl.sum(squares, axis=1)
        at = row * N + n
        total = _finished(total, above, square, res_ptr, at, n < N, eps, K, NORM, GATED, RESIDUAL)
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["rows"])
def _split(
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
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    """``_looped`` with the weight in registers and the sum cut into PARTS, one a warp."""
    announce(launch_pdl)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    live = m < rows
    k = tl.arange(0, PARTS)[:, None, None] * (K // PARTS) + tl.arange(0, BK)[None, None, :]  # [PARTS, 1, BK]
    x_at = x_ptr + m[None, :, None] * row_step + k
    w_at = w_ptr + n[None, :, None] * K + k
    weights, seconds, gains = (), (), ()
    for part in tl.static_range(K // PARTS // BK):
        weights += (tl.load(w_at + part * BK),)
        if GATED:
            seconds += (tl.load(w_at + N * K + part * BK),)
        if NORM:
            gains += (tl.load(norm_ptr + part * BK + k),)
    follow(launch_pdl)
    acc = tl.zeros((PARTS, BM, BN), dtype=tl.float32)
    up = tl.zeros((PARTS, BM, BN), dtype=tl.float32)
    squares = tl.zeros((PARTS, BM), dtype=tl.float32)
    for part in tl.static_range(K // PARTS // BK):
        x = tl.load(x_at + part * BK, mask=live[None, :, None], other=0.0)
        if NORM:
            x32 = x.to(tl.float32)
            squares += tl.sum(x32 * x32, axis=2)
            x = (x32 * gains[part].to(tl.float32)).to(x.dtype)
        acc = tl.dot(x, tl.permute(weights[part], (0, 2, 1)), acc)
        if GATED:
            up = tl.dot(x, tl.permute(seconds[part], (0, 2, 1)), up)
    at = m[:, None] * N + n[None, :]
    inside = live[:, None] & (n < N)[None, :]
    total, above = tl.sum(acc, axis=0), tl.sum(up, axis=0)
    square = tl.sum(squares, axis=0)[:, None]
    total = _finished(total, above, square, res_ptr, at, inside, eps, K, NORM, GATED, RESIDUAL)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def plan(rows: int, columns: int, size: int, gated: bool, dtype: torch.dtype) -> Plan:
    """The plan of a product of ``rows`` [rows, size] with a result of ``columns``."""
    if dtype != torch.bfloat16 or columns % 16 or size % 1024 or size > 4096:
        return Plan("looped")
    limit = next((limit for limit in (1, 2, 8, 16, 32) if rows <= limit), 64)
    known = PLANS.get((limit, columns, size, gated))
    if known is None:
        known = Plan("vector", columns=8, warps=8) if rows <= VECTOR_ROWS else Plan("looped")
    return known


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    cut: Plan | None = None,
) -> torch.Tensor:
    """Rows [R, K] times ``weight`` [N, K]: [R, N].

    Args:
        x: rows; the last dimension is dense, rows may be apart.
        weight: of a linear layer without bias; not written by the kernels just before.
        norm: gains of an RMS norm of x, like ``weight``.
        eps: of the norm.
        residual: [R, N], dense, added.
        gated: the result is silu(first N / 2) * (last N / 2): [R, N / 2].
        cut: instead of the plan for these sizes.
    """
    rows, size = x.shape
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty(rows, columns, device=x.device, dtype=x.dtype)
    tensors = (x, weight, x if norm is None else norm, x if residual is None else residual, out)
    options = {
        "N": columns,
        "K": size,
        "NORM": norm is not None,
        "GATED": gated,
        "RESIDUAL": residual is not None,
        "launch_pdl": overlap(x.device),
    }
    _launch(cut or plan(rows, columns, size, gated, x.dtype), tensors, eps, options)
    return out


def _launch(cut: Plan, tensors: tuple[torch.Tensor, ...], eps: float, options: dict[str, Any]) -> None:
    """The kernel of ``cut`` on its tensors, x the first and the result the last of them."""
    x, columns = tensors[0], tensors[-1].shape[1]
    rows, size = x.shape
    block_m = 16 if rows <= 16 else 32
    if cut.kernel == "vector":
        _vector[(columns // cut.columns,)](
            *tensors, x.stride(0), eps, ROWS=rows, BN=cut.columns, BK=cut.chunk, num_warps=cut.warps, **options
        )
    elif cut.kernel == "split":
        _split[(columns // cut.columns, triton.cdiv(rows, block_m))](
            *tensors,
            rows,
            x.stride(0),
            eps,
            BM=block_m,
            BN=cut.columns,
            BK=cut.chunk,
            PARTS=cut.warps,
            num_warps=cut.warps,
            **options,
        )
    else:
        # As many programs as the GPU has processors, about: each owns the columns that make it so.
        own = columns // PROGRAMS if columns % PROGRAMS == 0 and 8 <= columns // PROGRAMS <= 32 else 16
        single = x.dtype == torch.float32
        _looped[(columns // own, triton.cdiv(rows, block_m))](
            *tensors,
            rows,
            x.stride(0),
            eps,
            BM=block_m,
            BN=max(16, triton.next_power_of_2(own)),
            BK=next(b for b in (256, 128, 64, 32, 16) if size % b == 0),
            OWN=own,
            PRECISION="ieee" if single else "tf32",
            num_warps=4,
            num_stages=2 if single else 4,
            **options,
        )


def check_product(weight: torch.Tensor, cuts: Mapping[int, Plan]) -> str | None:
    """Run products with ``weight`` [N, K], ``cuts`` by number of rows; what is wrong with them here, or None.

    Where the GPU can, kernels start early from now on, if that gives the same.
    """
    return checked_overlap(weight.device, lambda: _check(weight, cuts))


def _check(weight: torch.Tensor, cuts: Mapping[int, Plan]) -> str | None:
    """What is wrong with the kernels as they are set up now, or None."""
    for rows, cut in cuts.items():
        inputs = torch.randn(2, rows, weight.shape[1], device=weight.device).to(weight.dtype)
        want = inputs[0].float() @ weight.float().T
        off = float((product(inputs[0], weight, cut=cut).float() - want).norm() / want.norm())
        if not off <= 0.01:
            return f"{rows} rows are off by {off:g} of their result"
        x = inputs[0].clone()
        if weight.is_cuda and not repeats(lambda: (product(x, weight, cut=cut),), x, inputs):  # noqa: B023
            return f"a graph of {rows} rows gives something else each time"
    return None
