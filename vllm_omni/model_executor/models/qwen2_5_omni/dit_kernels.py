"""Triton kernels of token2wav's flow: what stands between its matrix products, in one kernel each.

A window of a few blocks is so little work that every kernel takes its few microseconds whatever it does, so their
number decides. Plain PyTorch launches sixteen a layer, with these it is eight. Imported only where there is a GPU.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_norm(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, sum_ptr, out_ptr,
    eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One row: x (+ gate y, which is kept) normalised, scaled and shifted."""
    at = tl.program_id(0).to(tl.int64) * WIDTH
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    x = tl.load(x_ptr + at + i, mask=inside, other=0.0)
    if ADD:
        y = tl.load(y_ptr + at + i, mask=inside, other=0.0)
        x += y * tl.load(gate_ptr + i, mask=inside, other=0.0)
        tl.store(sum_ptr + at + i, x, mask=inside)
    off = tl.where(inside, x - tl.sum(x, axis=0) / WIDTH, 0.0)
    normed = off / tl.sqrt(tl.sum(off * off, axis=0) / WIDTH + eps)
    scale = tl.load(scale_ptr + i, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + i, mask=inside, other=0.0)
    tl.store(out_ptr + at + i, shift + normed * scale, mask=inside)


def norm_modulate(x_NSC: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor, eps: float) -> torch.Tensor:
    """shift + norm(x) * scale; everything contiguous float32."""
    out, width = torch.empty_like(x_NSC), x_NSC.shape[-1]
    rows = (x_NSC.numel() // width,)
    block = triton.next_power_of_2(width)
    _add_norm[rows](x_NSC, x_NSC, scale_C, scale_C, shift_C, x_NSC, out, eps, WIDTH=width, BLOCK=block, ADD=False)
    return out


def add_norm_modulate(
    x_NSC: torch.Tensor,
    y_NSC: torch.Tensor,
    gate_C: torch.Tensor,
    scale_C: torch.Tensor,
    shift_C: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """s = x + gate * y, and shift + norm(s) * scale; everything contiguous float32."""
    total, out, width = torch.empty_like(x_NSC), torch.empty_like(x_NSC), x_NSC.shape[-1]
    rows = (x_NSC.numel() // width,)
    block = triton.next_power_of_2(width)
    _add_norm[rows](x_NSC, y_NSC, gate_C, scale_C, shift_C, total, out, eps, WIDTH=width, BLOCK=block, ADD=True)
    return total, out


@triton.jit
def _rows(
    in_ptr, cos_ptr, sin_ptr, block, part, head,
    S: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SP: tl.constexpr, DP: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """[SP, DP] queries (part 0), keys (1) or values (2) of one block and head; head 0 of the first two is rotated."""
    WIDTH: tl.constexpr = 3 * HEADS * D + 2 * D
    s = tl.arange(0, SP)[:, None]
    d = tl.arange(0, DP)[None, :]
    inside = (s < S) & (d < D)
    row = block.to(tl.int64) * S + s
    x = tl.load(in_ptr + row * WIDTH + (part * HEADS + head) * D + d, mask=inside, other=0.0)
    if TURN:
        first = inside & (d + head * DP < DP)  # head 0
        turned = tl.load(in_ptr + row * WIDTH + 3 * HEADS * D + part * D + d, mask=first, other=0.0)
        cos = tl.load(cos_ptr + row * D + d, mask=first, other=1.0)
        sin = tl.load(sin_ptr + row * D + d, mask=first, other=0.0)
        x = x * cos + turned * sin
    return x


@triton.jit
def _look(
    in_ptr, cos_ptr, sin_ptr, other, head, count, scale, q, top, total, acc,
    S: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Add the first ``count`` frames of block ``other`` to a running softmax."""
    k = _rows(in_ptr, cos_ptr, sin_ptr, other, 1, head, S, D, HEADS, SP, DP, True)
    v = _rows(in_ptr, cos_ptr, sin_ptr, other, 2, head, S, D, HEADS, SP, DP, False)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(tl.arange(0, SP)[None, :] < count, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    keep = tl.exp(top - higher)
    weights = tl.exp(scores - higher[:, None])
    total = total * keep + tl.sum(weights, axis=1)
    acc = acc * keep[:, None] + tl.dot(weights, v, input_precision="ieee")
    return higher, total, acc


@triton.jit
def _attention(
    in_ptr, cos_ptr, sin_ptr, frames_ptr, out_ptr, blocks, scale,
    S: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SP: tl.constexpr, DP: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One block and head: softmax over the frames of the block and of the neighbours that the layer looks at."""
    block, head = tl.program_id(0), tl.program_id(1)
    q = _rows(in_ptr, cos_ptr, sin_ptr, block, 0, head, S, D, HEADS, SP, DP, True)
    top = tl.full((SP,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((SP,), dtype=tl.float32)
    acc = tl.zeros((SP, DP), dtype=tl.float32)
    # The own block comes first: it has a frame that counts, so ``top`` is finite from then on.
    count = tl.load(frames_ptr + block * 3 + 1)
    top, total, acc = _look(
        in_ptr, cos_ptr, sin_ptr, block, head, count, scale, q, top, total, acc, S, D, HEADS, SP, DP
    )
    if BACK:
        count = tl.load(frames_ptr + block * 3)
        other = tl.maximum(block - 1, 0)
        top, total, acc = _look(
            in_ptr, cos_ptr, sin_ptr, other, head, count, scale, q, top, total, acc, S, D, HEADS, SP, DP
        )
    if AHEAD:
        count = tl.load(frames_ptr + block * 3 + 2)
        other = tl.minimum(block + 1, blocks - 1)
        top, total, acc = _look(
            in_ptr, cos_ptr, sin_ptr, other, head, count, scale, q, top, total, acc, S, D, HEADS, SP, DP
        )
    s = tl.arange(0, SP)[:, None]
    d = tl.arange(0, DP)[None, :]
    at = (block.to(tl.int64) * S + s) * (HEADS * D) + head * D + d
    tl.store(out_ptr + at, acc / total[:, None], mask=(s < S) & (d < D))


def block_attention(
    joined_NSX: torch.Tensor,
    cos_NS1D: torch.Tensor,
    sin_NS1D: torch.Tensor,
    frames_N3: torch.Tensor,
    heads: int,
    look_back: bool,
    look_ahead: bool,
) -> torch.Tensor:
    """Attention of every block, [N, S, heads * D].

    Args:
        joined_NSX: queries, keys and values [3, heads, D], then queries and keys of head 0 turned by a quarter [2, D].
        cos_NS1D: rotary table.
        sin_NS1D: rotary table.
        frames_N3: int32, how many frames of the block before, of the block and of the block after count.
        heads: number of heads.
        look_back: whether the block before is looked at.
        look_ahead: whether the block after is looked at.
    """
    blocks, size, dim = joined_NSX.shape[0], joined_NSX.shape[1], cos_NS1D.shape[-1]
    out = joined_NSX.new_empty(blocks, size, heads * dim)
    _attention[(blocks, heads)](
        joined_NSX, cos_NS1D, sin_NS1D, frames_N3, out, blocks, dim**-0.5,
        S=size, D=dim, HEADS=heads, SP=max(16, triton.next_power_of_2(size)), DP=max(16, triton.next_power_of_2(dim)),
        BACK=look_back, AHEAD=look_ahead, num_warps=4,
    )  # fmt: skip
    return out
