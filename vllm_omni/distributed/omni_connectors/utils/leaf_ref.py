"""Leaves that stay in shared memory while a process passes them on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_omni.distributed.omni_connectors.utils.arena import Arena, Ref
from vllm_omni.distributed.omni_connectors.utils.leaves import build


class LeafRef:
    """A large leaf that stays where its maker put it; frees its lease when it is dropped.

    Attributes:
        kind: ``tensor``, ``array``, ``image`` or ``bytes``.
        facts: what is known without the bytes: (dtype, shape) or (mode, size, palette).
    """

    __slots__ = ("_arena", "_view", "facts", "kind", "ref", "shared")

    def __init__(self, kind: str, facts: list[Any], ref: Ref, arena: Arena) -> None:
        self.kind = kind
        self.facts = facts
        self.ref = ref
        self.shared = False
        """Several readers: each takes a copy, so that none sees what another writes."""
        self._arena = arena
        self._view: Any = None

    def __repr__(self) -> str:
        return f"LeafRef({self.kind}, {self.facts}, {self.ref.nbytes} bytes)"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a tensor or array."""
        return tuple(self.facts[1])

    def load(self, copy: bool = False) -> Any:
        """The value itself, as a view of the shared bytes, whose lease then lasts as long as the view; or a copy."""
        if self._view is None:
            self._view = self._arena.open(self.ref)
        return build(self.kind, self.facts, self._view, shared=not (self.shared or copy))

    def lend(self, holder: int) -> list[Any]:
        """Header words of a further reference, for process ``holder``."""
        return [self.kind, self.facts, self._arena.lend(self.ref, holder), self.shared]

    def __del__(self) -> None:
        if self._view is None:
            self._arena.release(self.ref)


def resolve(obj: Any, copy: bool = True) -> Any:
    """``obj`` with every ``LeafRef`` replaced by a copy of its value, which may be kept for as long as one likes; or by
    the value itself, as ``LeafRef.load`` gives it."""
    kind = type(obj)
    if kind is LeafRef:
        return obj.load(copy)
    if kind is dict:
        return {key: resolve(value, copy) for key, value in obj.items()}
    if kind is list or kind is tuple:
        return kind(resolve(value, copy) for value in obj)
    return obj


def nbytes_of(obj: Any) -> int:
    """Bytes of the leaves and texts in ``obj``, wherever they lie; what knows no size counts nothing."""
    kind = type(obj)
    if kind is LeafRef:
        return obj.ref.nbytes
    if kind is str or kind is bytes:
        return len(obj)
    if kind is dict:
        return sum(map(nbytes_of, obj.values()))
    if kind is list or kind is tuple:
        return 8 * len(obj) if obj and type(obj[0]) is int else sum(map(nbytes_of, obj))
    if (kind.__module__, kind.__name__) in (("torch", "Tensor"), ("numpy", "ndarray")):
        return int(obj.nbytes)
    return 0


def leaf_refs(obj: Any) -> Iterator[LeafRef]:
    """Every ``LeafRef`` in ``obj``."""
    kind = type(obj)
    if kind is LeafRef:
        yield obj
    elif kind is dict:
        for value in obj.values():
            yield from leaf_refs(value)
    elif kind is list or kind is tuple:
        for value in obj:
            yield from leaf_refs(value)
