"""Linear layers that ranks share: vLLM's own, and two shapes of DiT models that vLLM has not.

Parameters that are put together from several tensors of a checkpoint carry ``omni_shards``, the names of those parts
(see ``models.common.weights``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)


def qkv_linear(dim: int, head_size: int, num_heads: int, bias: bool = True) -> Any:
    """Queries, keys and values of ``num_heads`` heads in one matrix, heads shared by the tensor-parallel ranks."""
    layer = QKVParallelLinear(dim, head_size, num_heads, bias=bias, return_bias=False)
    return _with_shards(layer, ("q", "k", "v"))


def merged_linear(dim: int, sizes: Sequence[int], bias: bool = True) -> Any:
    """Several linears of one input in one matrix, each shared by the tensor-parallel ranks; parts are 0, 1, ..."""
    layer = MergedColumnParallelLinear(dim, list(sizes), bias=bias, return_bias=False)
    return _with_shards(layer, tuple(range(len(sizes))))


def column_linear(dim: int, out_dim: int, bias: bool = True) -> Any:
    """Linear whose outputs are shared by the tensor-parallel ranks."""
    return ColumnParallelLinear(dim, out_dim, bias=bias, return_bias=False)


def row_linear(dim: int, out_dim: int, bias: bool = True) -> Any:
    """Linear whose inputs are shared by the tensor-parallel ranks; the result is whole on each."""
    return RowParallelLinear(dim, out_dim, bias=bias, return_bias=False)


def _with_shards(layer: nn.Module, shards: tuple[str | int, ...]) -> nn.Module:
    for param in layer.parameters():
        vars(param)["omni_shards"] = shards
    return layer


class PackedRowParallelLinear(RowParallelLinear):
    """Row-parallel linear whose input is a concatenation: a rank holds its share of each part, not of the whole.

    Args:
        part_sizes: widths of the concatenated parts, before sharing.
        out_dim: width of the result.
    """

    def __init__(self, part_sizes: Sequence[int], out_dim: int, bias: bool = True) -> None:
        # RowParallelLinear hands its loader to the parameter while it is being built; the sizes are read at load time.
        super().__init__(sum(part_sizes), out_dim, bias=bias, return_bias=False)
        self.part_sizes = tuple(part_sizes)

    def weight_loader_v2(self, param: Any, loaded_weight: torch.Tensor) -> None:
        """Take this rank's columns of every part."""
        mine = [part.chunk(self.tp_size, dim=1)[self.tp_rank] for part in loaded_weight.split(self.part_sizes, dim=1)]
        if param.data.shape != (loaded_weight.shape[0], sum(part.shape[1] for part in mine)):
            raise ValueError(f"shape {list(loaded_weight.shape)} for {list(param.data.shape)} on each rank")
        torch.cat(mine, dim=1, out=param.data) if param.data.dtype == loaded_weight.dtype else param.data.copy_(
            torch.cat(mine, dim=1)
        )


class StackedLinear(nn.Module):
    """Many linears of one small input as one matrix: one launch in place of one a block.

    Used for modulation. Rows are shared by the tensor-parallel ranks and the result is gathered whole.

    Args:
        dim: width of the input.
        parts: name and width of each linear, in the order of the result.
    """

    def __init__(self, dim: int, parts: Mapping[str, int]) -> None:
        super().__init__()
        self.tp_size = get_tensor_model_parallel_world_size()
        self.tp_rank = get_tensor_model_parallel_rank()
        self._rows: dict[str, tuple[int, int]] = {}
        total = 0
        for name, size in parts.items():
            self._rows[name] = (total, total + size)
            total += size
        if total % self.tp_size:
            raise ValueError(f"{total} rows cannot be shared by {self.tp_size} ranks")
        self.out_features = total
        self.weight = nn.Parameter(torch.empty(total // self.tp_size, dim), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(total // self.tp_size), requires_grad=False)
        for param in (self.weight, self.bias):
            vars(param).update(omni_shards=tuple(parts), weight_loader=self._load)

    def _load(self, param: nn.Parameter, tensor: torch.Tensor, part: str) -> None:
        first, last = self._rows[part]
        if tensor.shape != (last - first, *param.shape[1:]):
            raise ValueError(f"shape {list(tensor.shape)} where {[last - first, *param.shape[1:]]} belongs")
        mine = param.shape[0]
        low, high = max(first, self.tp_rank * mine), min(last, (self.tp_rank + 1) * mine)
        if low < high:
            offset = self.tp_rank * mine
            param.data[low - offset : high - offset].copy_(tensor[low - first : high - first])

    def rows(self, part: str) -> slice:
        """Where linear ``part`` stands in the result."""
        return slice(*self._rows[part])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] to [..., sum of the widths]."""
        out = functional.linear(x, self.weight, self.bias)
        if self.tp_size > 1:
            out = tensor_model_parallel_all_gather(out)
        return out
