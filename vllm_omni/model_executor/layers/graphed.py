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


class GraphedRows:
    """``function`` of the first n rows of tensors that it keeps, with one CUDA graph for each of a few n.

    The function has static shapes for a given n and reads and writes tensors whose places are fixed, so nothing is
    copied for a call. A call of a batch runs the next captured n: rows beyond the batch hold whatever stood there.
    Before ``capture``, beyond the largest n and on a CPU the function runs as it is.
    """

    def __init__(self, function: Callable[[int], Tensors]) -> None:
        self._function = function
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensors]] = {}

    @property
    def sizes(self) -> list[int]:
        """Captured numbers of rows, in order."""
        return sorted(self._captured)

    def capture(self, sizes: Sequence[int]) -> None:
        """Capture a graph for each number of rows in ``sizes``."""
        pool = None
        found = {}
        for size in sorted(sizes, reverse=True):  # the largest first: the others fit into its memory
            found[size] = graph, _ = record(functools.partial(self._function, size), pool)
            pool = graph.pool()
        self._captured = dict(sorted(found.items()))

    def __call__(self, batch: int) -> Tensors:
        """The function's outputs for ``batch`` rows or a few more. The next call may overwrite them."""
        for size, (graph, outputs) in self._captured.items():
            if size >= batch:
                graph.replay()
                return outputs
        return self._function(batch)


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
