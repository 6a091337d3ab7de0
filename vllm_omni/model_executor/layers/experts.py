"""Experts of a few rows: the weights of a layer, how they are cut for the kernels, and plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

MOST_EXPERTS = 128
"""Every pair ranks all logits by comparing each with each."""


@dataclass(frozen=True)
class ExpertPlan:
    """How the work of a layer is cut."""

    rows: int = 4
    """Most rows that gain."""
    router_columns: int = 2
    """Experts whose logits a program finds."""
    router_warps: int = 2
    up_columns: int = 16
    """Columns of the inner result a program owns."""
    up_warps: int = 8
    down_columns: int = 2
    """Columns of the result a program owns."""
    down_warps: int = 8


# By (hidden, inner, shared inner, experts a row): Qwen3-Omni-30B-A3B's talker and thinker on one H200.
PLANS: dict[tuple[int, int, int, int], ExpertPlan] = {
    (1024, 384, 768, 6): ExpertPlan(router_columns=4, router_warps=4, down_warps=4),
    (2048, 768, 0, 8): ExpertPlan(),
}
"""Measured plans; sizes that are not here take the defaults."""


@dataclass(frozen=True)
class Experts:
    """Weights of a layer. I is the inner width of an expert, S of the shared one; on several GPUs, one GPU's part."""

    router: torch.Tensor
    """[E, H]"""
    up: torch.Tensor
    """[E, 2 I, H]: the activated half first."""
    down: torch.Tensor
    """[E, H, I]"""
    top_k: int
    renormalise: bool
    """The shares of the chosen experts add up to 1."""
    shared_up: torch.Tensor | None = None
    """[2 S, H]"""
    shared_down: torch.Tensor | None = None
    """[H, S]"""
    shared_gate: torch.Tensor | None = None
    """[1, H]: the shared expert's share is the sigmoid of this product."""

    @property
    def shared_inner(self) -> int:
        """S, 0 without a shared expert."""
        return 0 if self.shared_down is None else self.shared_down.shape[1]

    def unfit(self) -> str | None:
        """Why the kernels cannot do this layer, or None."""
        count, hidden, inner = self.down.shape
        tensors = [self.router, self.up, self.down, self.shared_up, self.shared_down, self.shared_gate]
        if any(tensor is not None and tensor.dtype != torch.bfloat16 for tensor in tensors):
            return "weights that are not bfloat16"
        if any(tensor is not None and not tensor.is_contiguous() for tensor in tensors):
            return "weights with gaps"
        if count > MOST_EXPERTS or count & (count - 1):
            return f"{count} experts"
        if self.up.shape != (count, 2 * inner, hidden) or self.router.shape != (count, hidden):
            return f"weights of shapes {tuple(self.router.shape)}, {tuple(self.up.shape)}, {tuple(self.down.shape)}"
        if hidden % 128 or inner % 64 or self.shared_inner % inner:
            return f"widths {hidden}, {inner} and {self.shared_inner}"
        return None

    def plan(self) -> ExpertPlan:
        """How this layer is cut."""
        _, hidden, inner = self.down.shape
        return PLANS.get((hidden, inner, self.shared_inner, self.top_k), ExpertPlan())


def plain_experts(x: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What ``expert_kernels.run_experts`` gives for rows [R, H], in float32."""
    rows = x.float()
    logits = (rows @ experts.router.float().T).to(x.dtype).float()
    shares, chosen = logits.softmax(-1).topk(experts.top_k)
    if experts.renormalise:
        shares = shares / shares.sum(-1, keepdim=True)
    sums = []
    for row, share, ids in zip(rows, shares, chosen, strict=True):
        gate, up = (experts.up[ids].float() @ row).chunk(2, dim=-1)
        inner = F.silu(gate) * up  # [K, I]
        sums.append(torch.einsum("k,khi,ki->h", share, experts.down[ids].float(), inner))
    if experts.shared_up is None or experts.shared_down is None or experts.shared_gate is None:
        return torch.stack(sums), None
    gate, up = (rows @ experts.shared_up.float().T).chunk(2, dim=-1)
    shared = (F.silu(gate) * up) @ experts.shared_down.float().T
    return torch.stack(sums), (rows @ experts.shared_gate.float().T).sigmoid() * shared
