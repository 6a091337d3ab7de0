"""Run a function of batched tensors as CUDA graphs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Tensors = tuple[torch.Tensor, ...]
Result = TypeVar("Result")


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
            graph, outputs = record(functools.partial(self._function, *inputs), pool)
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


class GraphedGrid:
    """``function`` of one tensor [batch, length, ...] with a CUDA graph for each of a few (batch, length).

    A call is padded with zeros to the smallest captured size that holds it; the caller ignores what comes of the
    padding, so a row must not look ahead of its own end. Calls that fit nothing, or would compute several times what
    they need, run as they are. What a call returns is not touched by later calls.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._function = function
        self._captured: dict[tuple[int, int], _Captured] = {}

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Captured sizes, in order."""
        return sorted(self._captured)

    def capture(self, sizes: Sequence[tuple[int, int]], example: torch.Tensor) -> None:
        """Capture a graph for each (batch, length); of ``example`` [1, 1, ...] the other sizes and the type count.

        For a batch of one, convolutions try their algorithms in the run before the capture: shapes are fixed from here
        on, and the libraries' first guess for short windows is a slow one. It takes a tenth of a second a convolution.
        """
        pool = None
        for batch, length in sorted(sizes, key=lambda size: size[0] * size[1], reverse=True):
            given = example.expand(batch, length, *example.shape[2:]).clone()
            with torch.backends.cudnn.flags(
                enabled=True, benchmark=batch == 1, deterministic=False, allow_tf32=torch.backends.cudnn.allow_tf32
            ):
                graph, output = record(functools.partial(self._function, given), pool)
            pool = graph.pool()
            self._captured[batch, length] = _Captured(graph, (given,), (output,))

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """The function of ``value``, with as many rows; longer where it was padded."""
        batch, length = value.shape[:2]
        fitting = [size for size in self._captured if size[0] >= batch and size[1] >= length]
        size = min(fitting, key=lambda size: size[0] * size[1], default=None)
        if size is None or size[0] * size[1] > 4 * batch * length + 64:
            return self._function(value)
        captured = self._captured[size]
        (buffer,) = captured.inputs
        buffer.zero_()
        buffer[:batch, :length].copy_(value)
        captured.graph.replay()
        return captured.outputs[0][:batch].clone()


def record(function: Callable[[], Result], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Run ``function`` once beside the current stream, then capture it; the graph and what it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = function()
    return graph, outputs


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8 and so on, and ``largest``."""
    powers = itertools.takewhile(lambda size: size < largest, (1 << i for i in itertools.count()))
    return [*powers, largest]
