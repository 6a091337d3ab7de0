"""Triton kernels for a mixture of experts of a few rows: two kernels behind the router's product.

A row reads the weights of its few experts and little else, so it is bound by memory and, at one row, by the start of
each kernel. vLLM's general path sorts rows by expert, pads the groups, and runs products, activation, shares and sums
as kernels of their own: about a dozen launches a layer. Here every (row, expert) pair multiplies for itself:

    product           logits of the experts                        [R, E]
    ``_up``           finds its expert, silu(x @ gate.T) * (x @ up.T)   [R, slots, I]
    ``_down``         sum of all slots with their shares           [R, H]

A shared expert takes part as further slots of ``_up`` and as a second result of ``_down``. Rows that chose the same
expert read it twice, once from memory and once from the cache: that pays for a few rows and not for many
(``ExpertPlan.rows``). Kernels start early (``overlap``).
"""

# mypy: disable-error-code="no-untyped-def,assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_omni.model_executor.layers.cuts import Plan
from vllm_omni.model_executor.layers.experts import ExpertPlan, Experts, plain_experts
from vllm_omni.model_executor.layers.overlap import announce, checked_overlap, follow, overlap, repeats
from vllm_omni.model_executor.layers.product_kernels import _halves, _words, product


@triton.jit
def _sortable(number, index, E: tl.constexpr):
    """bfloat16 bits, sign extended, as integers in the numbers' order; the lower index first where two are equal."""
    return ((number ^ ((number >> 31) & 0x7FFF)) << 8) | (E - 1 - index)


@triton.jit
def _keys(logits_ptr, E: tl.constexpr):
    """Logits [E] as keys that differ, and their numbers in float32."""
    pair = tl.arange(0, E // 2)
    words = tl.load(_words(logits_ptr) + pair)
    low, high = _halves(words)
    keys = tl.interleave(_sortable(words << 16 >> 16, 2 * pair, E), _sortable(words >> 16, 2 * pair + 1, E))
    return keys, tl.interleave(low, high)


@triton.jit
def _share(logits, rank, slot, TOP_K: tl.constexpr, RENORMALISE: tl.constexpr):
    """What the expert of a rank counts."""
    powers = tl.exp(logits - tl.max(logits, axis=0))
    whole = tl.sum(tl.where(rank < TOP_K, powers, 0.0), axis=0) if RENORMALISE else tl.sum(powers, axis=0)
    return tl.sum(tl.where(rank == slot, powers, 0.0), axis=0) / whole


@triton.jit
def _up(
    x_ptr,
    logits_ptr,
    w_ptr,
    shared_ptr,
    shared_gate_ptr,
    inner_ptr,
    chosen_ptr,
    share_ptr,
    H: tl.constexpr,
    INNER: tl.constexpr,
    SHARED: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RENORMALISE: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    """inner = silu(gate) * up of BN columns of one slot of one row; the first program of a slot notes its expert."""
    announce(launch_pdl)
    slot, row = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK // 2)
    all_k = n[:, None] * 0 + k[None, :]
    follow(launch_pdl)
    x_at = _words(x_ptr) + row * (H // 2) + all_k
    factor = 1.0
    if slot < TOP_K:
        keys, logits = _keys(logits_ptr + row * E, E)
        rank = tl.sum((keys[None, :] > keys[:, None]).to(tl.int32), axis=1)
        expert = tl.max(tl.where(rank == slot, tl.arange(0, E), 0), axis=0)
        w_at = w_ptr + expert.to(tl.int64) * (2 * INNER * H)
        half = INNER * (H // 2)
        if tl.program_id(0) == 0:
            tl.store(chosen_ptr + row * TOP_K + slot, expert)
            tl.store(share_ptr + row * TOP_K + slot, _share(logits, rank, slot, TOP_K, RENORMALISE))
    else:
        w_at = shared_ptr + (slot - TOP_K).to(tl.int64) * (INNER * H)
        half = SHARED * (H // 2)
        if SHARED > 0:
            dot = tl.zeros((BN, BK // 2), dtype=tl.float32)
            for part in tl.static_range(H // BK):
                low, high = _halves(tl.load(x_at + part * (BK // 2)))
                gate_low, gate_high = _halves(tl.load(_words(shared_gate_ptr) + part * (BK // 2) + all_k))
                dot += low * gate_low + high * gate_high
            # All rows of ``dot`` are alike.
            factor = 1.0 / (1.0 + tl.exp(-tl.max(tl.sum(dot, axis=1), axis=0)))
    at = _words(w_at) + n[:, None] * (H // 2) + k[None, :]
    gates = tl.zeros((BN, BK // 2), dtype=tl.float32)
    ups = tl.zeros((BN, BK // 2), dtype=tl.float32)
    for part in tl.static_range(H // BK):
        low, high = _halves(tl.load(x_at + part * (BK // 2)))
        w_low, w_high = _halves(tl.load(at + part * (BK // 2)))
        gates += w_low * low + w_high * high
        w_low, w_high = _halves(tl.load(at + half + part * (BK // 2)))
        ups += w_low * low + w_high * high
    gate, up = tl.sum(gates, axis=1), tl.sum(ups, axis=1)
    value = gate / (1.0 + tl.exp(-gate)) * up * factor
    tl.store(inner_ptr + row * (TOP_K * INNER + SHARED) + slot * INNER + n, value.to(inner_ptr.dtype.element_ty))


@triton.jit
def _down(
    inner_ptr,
    chosen_ptr,
    share_ptr,
    w_ptr,
    shared_ptr,
    out_ptr,
    shared_out_ptr,
    H: tl.constexpr,
    INNER: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    """out = sum over slots of share * (inner @ down.T) of BN columns of one row; the shared slots by themselves.

    All slots are read at once: tiles are [BN, SLOTS, BK / 2].
    """
    announce(launch_pdl)
    row = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    slot = tl.arange(0, SLOTS)
    k = tl.arange(0, BK // 2)[None, None, :]
    routed, live = slot < TOP_K, slot < TOP_K + SHARED // INNER
    follow(launch_pdl)
    expert = tl.load(chosen_ptr + row * TOP_K + slot, mask=routed, other=0).to(tl.int64)
    share = tl.load(share_ptr + row * TOP_K + slot, mask=routed, other=1.0)
    at = (_words(w_ptr) + expert * (H * INNER // 2))[None, :, None] + n[:, None, None] * (INNER // 2) + k
    if SHARED > 0:
        shared_at = (
            _words(shared_ptr) + n[:, None, None] * (SHARED // 2) + (slot - TOP_K)[None, :, None] * (INNER // 2) + k
        )
        at = tl.where(routed[None, :, None], at, shared_at)
    inner_at = (
        _words(inner_ptr)
        + row * ((TOP_K * INNER + SHARED) // 2)
        + n[:, None, None] * 0
        + slot[None, :, None] * (INNER // 2)
    )
    acc = tl.zeros((BN, SLOTS, BK // 2), dtype=tl.float32)
    for part in tl.static_range(INNER // BK):
        w_low, w_high = _halves(tl.load(at + part * (BK // 2), mask=live[None, :, None], other=0))
        low, high = _halves(tl.load(inner_at + part * (BK // 2) + k, mask=live[None, :, None], other=0))
        acc += w_low * low + w_high * high
    sums = tl.sum(acc, axis=2) * share[None, :]
    total = tl.sum(tl.where(routed[None, :], sums, 0.0), axis=1)
    tl.store(out_ptr + row * H + n, total.to(out_ptr.dtype.element_ty))
    if SHARED > 0:
        total = tl.sum(tl.where(routed[None, :], 0.0, sums), axis=1)
        tl.store(shared_out_ptr + row * H + n, total.to(out_ptr.dtype.element_ty))


def _chunk(size: int) -> int:
    """Elements of a weight's row that are loaded at once."""
    return next(chunk for chunk in (256, 128, 64) if size % chunk == 0)


def run_experts(
    x: torch.Tensor, experts: Experts, plan: ExpertPlan | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's experts for rows [R, H], dense: the chosen ones' sum, and the shared one's result.

    ``experts.unfit()`` must be None.
    """
    cut = plan or experts.plan()
    rows, hidden = x.shape
    count, _, inner = experts.down.shape
    shared, top_k = experts.shared_inner, experts.top_k
    router = Plan("vector", cut.router_columns, cut.router_warps, _chunk(hidden))
    logits = product(x, experts.router, cut=router)
    slots = top_k * inner + shared
    between = torch.empty(rows, slots, device=x.device, dtype=x.dtype)
    chosen = torch.empty(rows, top_k, device=x.device, dtype=torch.int32)
    share = torch.empty(rows, top_k, device=x.device, dtype=torch.float32)
    out = torch.empty_like(x)
    shared_out = torch.empty_like(x) if shared else None
    sizes = {"H": hidden, "INNER": inner, "SHARED": shared, "TOP_K": top_k, "launch_pdl": overlap(x.device)}
    _up[(inner // cut.up_columns, slots // inner, rows)](
        x,
        logits,
        experts.up,
        experts.up if experts.shared_up is None else experts.shared_up,
        x if experts.shared_gate is None else experts.shared_gate,
        between,
        chosen,
        share,
        E=count,
        BN=cut.up_columns,
        BK=_chunk(hidden),
        RENORMALISE=experts.renormalise,
        num_warps=cut.up_warps,
        **sizes,
    )
    _down[(hidden // cut.down_columns, rows)](
        between,
        chosen,
        share,
        experts.down,
        experts.down if experts.shared_down is None else experts.shared_down,
        out,
        out if shared_out is None else shared_out,
        SLOTS=triton.next_power_of_2(slots // inner),
        BN=cut.down_columns,
        BK=_chunk(inner),
        num_warps=cut.down_warps,
        **sizes,
    )
    return out, shared_out


def check_experts(experts: Experts) -> str | None:
    """Run the kernels on these weights; what is wrong with them on this machine, or None.

    Where the GPU can, kernels start early from now on, if that gives the same.
    """
    return checked_overlap(experts.router.device, lambda: _check(experts))


def _check(experts: Experts) -> str | None:
    """What is wrong with the kernels as they are set up now, or None."""
    most = experts.plan().rows
    for rows in sorted({1, most}):
        inputs = torch.randn(2, rows, experts.router.shape[1], device=experts.router.device).to(experts.router.dtype)
        for got, want in zip(run_experts(inputs[0], experts), plain_experts(inputs[0], experts), strict=True):
            if got is not None and want is not None:
                off = float((got.float() - want).norm() / want.norm())
                if not off <= 0.03:
                    return f"{rows} rows are off by {off:g} of their result"
        x = inputs[0].clone()
        if experts.router.is_cuda and not repeats(lambda: _results(x, experts), x, inputs):  # noqa: B023
            return f"a graph of {rows} rows gives something else each time"
    return None


def _results(x: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, ...]:
    """Those there are."""
    return tuple(result for result in run_experts(x, experts) if result is not None)
