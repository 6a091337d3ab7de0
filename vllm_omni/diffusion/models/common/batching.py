"""Put the parts of several requests into the tensors of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vllm_omni.diffusion.models.common.state import Conditioning, DenoiseState
from vllm_omni.diffusion.models.common.transformer import DiTModel

BranchName = Literal["positive", "negative"]

_TABLE_BYTES = 256 * 2**20


def stack_texts(conditions: Sequence[Conditioning]) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """Texts of all requests below each other, padded with zeros to the longest, and how many tokens of each count.

    The lengths are None when nothing is padded: then there is no mask, as in the reference.
    """
    if len(conditions) == 1:
        return conditions[0].text_BTD, conditions[0].text_lengths
    longest = max(condition.text_BTD.shape[1] for condition in conditions)
    padded = [
        torch.nn.functional.pad(condition.text_BTD, (0, 0, 0, longest - condition.text_BTD.shape[1]))
        for condition in conditions
    ]
    lengths = tuple(length for condition in conditions for length in condition.lengths())
    return torch.cat(padded), None if all(length == longest for length in lengths) else lengths


@dataclass(frozen=True)
class _Table:
    """Modulation for some coming steps of a request."""

    first: int
    rows_NBM: torch.Tensor
    rows: tuple[torch.Tensor, ...]


def modulation_row(transformer: DiTModel, state: DenoiseState, branch: BranchName) -> torch.Tensor:
    """Modulation of the state's next step, [B or 1, M].

    It is made for many steps at once and kept in the state, up to ``_TABLE_BYTES`` at a time: the modulation weights (a
    third of Qwen-Image) are then read once a request and not once a step. Branches share it where the text has no part.
    """
    condition = state.branches.get(branch)
    key = f"modulation_{branch}" if condition.pooled_BD is not None else "modulation"
    table: _Table | None = state.scratch.get(key)
    i = state.step_index
    if table is None or not table.first <= i < table.first + len(table.rows):
        table = _make_table(transformer, state, condition)
        state.scratch[key] = table
    return table.rows[i - table.first]


def _make_table(transformer: DiTModel, state: DenoiseState, condition: Conditioning) -> _Table:
    pooled_BD = condition.pooled_BD
    batch = 1 if pooled_BD is None else pooled_BD.shape[0]
    weight = transformer.modulation.weight
    steps = max(1, _TABLE_BYTES // (batch * transformer.modulation.out_features * weight.element_size()))
    first = state.step_index
    timesteps_N = state.timesteps[first : first + steps].to(weight.device)
    guidance_B = None
    if state.guidance_scale is not None:
        guidance_B = torch.full((batch,), state.guidance_scale, device=weight.device)
    rows_NBM = transformer.modulate(timesteps_N, pooled_BD, guidance_B)
    return _Table(first, rows_NBM, rows_NBM.unbind(0))
