"""How products of a few rows are cut for the kernels of ``product_kernels``; to be read without Triton."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How a product is cut."""

    kernel: str
    """``vector`` (no tensor cores), ``split`` (each warp has a part of the sum) or ``looped`` (neither)."""
    columns: int = 16
    """Columns of the result a program owns; for a gated product, of each half."""
    warps: int = 4
    """Warps of a program."""
    chunk: int = 256
    """Elements of a weight's row that are loaded at once: ``vector`` by all warps, ``split`` by each."""
