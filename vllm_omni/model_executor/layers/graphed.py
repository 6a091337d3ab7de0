"""Run a function of batched tensors as CUDA graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Captured:
    """One graph and the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    outputs: Tensors


class GraphedBatch:
    """``function`` with one CUDA graph for each of a few batch sizes.

    The function takes and returns tuples of tensors whose first dimension is the batch, has static shapes for a batch
    size, and treats every row by itself. A call is padded to the next captured size. Before ``capture``, beyond the
    largest captured size and on a CPU it runs as it is. What a call returns is not touched by later calls.
    """

    def __init__(self, function: Callable[..., Tensors]) -> None:
        self._function = function
        self._captured: dict[int, _Captured] = {}

    @property
    def sizes(self) -> list[int]:
        """Captured batch sizes, in order."""
        return sorted(self._captured)

    def capture(self, sizes: Sequence[int], example: Tensors) -> None:
        """Capture a graph for each batch size of ``sizes``.

        Args:
            sizes: batch sizes.
            example: inputs of any batch size, on the device; their shapes and types count, and row 0 is what the runs
                before the capture compute on.
        """
        pool = None
        for size in sorted(sizes, reverse=True):  # the largest first: the others fit into its memory
            inputs = tuple(value[:1].expand(size, *value.shape[1:]).clone() for value in example)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._function(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                outputs = self._function(*inputs)
            pool = graph.pool()
            self._captured[size] = _Captured(graph, inputs, outputs)

    def __call__(self, *inputs: torch.Tensor) -> Tensors:
        """The function's outputs for ``inputs``."""
        batch = inputs[0].shape[0]
        size = next((size for size in self.sizes if size >= batch), None)
        if size is None:
            return self._function(*inputs)
        captured = self._captured[size]
        for buffer, value in zip(captured.inputs, inputs, strict=True):
            buffer[:batch].copy_(value)
        captured.graph.replay()
        return tuple(value[:batch].clone() for value in captured.outputs)


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8 and so on, and ``largest``."""
    powers = itertools.takewhile(lambda size: size < largest, (1 << i for i in itertools.count()))
    return [*powers, largest]
