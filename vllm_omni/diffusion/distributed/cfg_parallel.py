"""Classifier-free guidance on two ranks: each computes one branch."""

from __future__ import annotations

from typing import Literal

import torch

from vllm_omni.diffusion.distributed import parallel_state

BranchName = Literal["positive", "negative"]


class CFGParallelMixin:
    """For pipelines whose guidance has a positive and a negative branch."""

    def my_branch(self) -> BranchName | None:
        """The branch that this rank computes, or None when it computes both."""
        if parallel_state.get_cfg_world_size() == 1:
            return None
        return "positive" if parallel_state.get_cfg_rank() == 0 else "negative"

    def gather_branches(self, mine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both branches' predictions on every rank, given this rank's; collective over the guidance group."""
        group = parallel_state.get_cfg_group()
        assert group is not None
        positive, negative = group.all_gather(mine.contiguous(), dim=0).chunk(2)
        return positive, negative
