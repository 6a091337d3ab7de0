"""Leaves of a payload: the values that are a buffer and a few words about it.

``describe`` gives (kind, facts, size, fill); ``build`` is its inverse. torch, numpy and PIL are imported when a value
of theirs is met, so that a process without any stays small.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

Fill = Callable[[memoryview], None]


class Leaf(NamedTuple):
    """A value as a buffer. ``view`` is the buffer itself, where it lies in one piece; else ``gather`` writes it."""

    kind: str
    facts: list[Any]
    nbytes: int
    view: memoryview | None
    gather: Fill | None = None

    def fill(self, target: memoryview) -> None:
        """Write the buffer into a place of ``nbytes`` bytes, in one copy."""
        if self.view is not None:
            target[:] = self.view
        elif self.gather is not None:
            self.gather(target)


@functools.cache
def kind_of(cls: type) -> str | None:
    """``tensor``, ``array``, ``image``, ``bytes``, or None when ``cls`` is no leaf."""
    if issubclass(cls, (bytes, bytearray, memoryview)):
        return "bytes"
    origins = {(base.__module__.partition(".")[0], base.__name__) for base in cls.__mro__}
    for origin, kind in ((("torch", "Tensor"), "tensor"), (("numpy", "ndarray"), "array"), (("PIL", "Image"), "image")):
        if origin in origins:
            return kind
    return None


def describe(kind: str, value: Any) -> Leaf:
    """The leaf of ``value``. Raises ``TypeError`` or ``ValueError`` when it holds something that cannot travel."""
    return _DESCRIBE[kind](value)


def build(kind: str, facts: list[Any], data: Any, shared: bool) -> Any:
    """The value of a leaf. ``data`` is a buffer; with ``shared`` the value may stay a view of it, else it is copied."""
    return _BUILD[kind](facts, data, shared)


def _describe_bytes(value: bytes | bytearray | memoryview) -> Leaf:
    view = memoryview(value).cast("B")
    return Leaf("bytes", [], view.nbytes, view)


def _build_bytes(facts: list[Any], data: Any, shared: bool) -> bytes:
    return bytes(data)


def _describe_tensor(value: Any) -> Leaf:
    import torch

    if value.layout is not torch.strided or value.is_quantized or value.device.type == "meta":
        raise TypeError(f"a {value.layout} tensor on {value.device} holds no plain buffer")
    source = value.detach()
    facts = [str(source.dtype).removeprefix("torch."), list(source.shape)]
    if source.device.type == "cpu" and source.is_contiguous() and not (source.is_conj() or source.is_neg()):
        flat = source.view(-1).view(torch.uint8) if source.numel() else torch.empty(0, dtype=torch.uint8)
        return Leaf("tensor", facts, source.nbytes, memoryview(flat.numpy()))

    def gather(target: memoryview) -> None:
        if source.numel():
            flat = torch.frombuffer(target, dtype=torch.uint8).view(source.dtype)
            flat.view(source.shape).copy_(source)

    return Leaf("tensor", facts, source.nbytes, None, gather)


def _build_tensor(facts: list[Any], data: Any, shared: bool) -> Any:
    import torch

    dtype, shape = getattr(torch, facts[0]), facts[1]
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    if shared:
        return torch.frombuffer(data, dtype=dtype).view(shape)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def _describe_array(value: Any) -> Leaf:
    import numpy as np

    if value.dtype.hasobject or value.dtype.names:
        raise TypeError(f"an array of dtype {value.dtype} holds no plain buffer")

    facts = [value.dtype.str, list(value.shape)]
    if value.flags.c_contiguous:
        return Leaf("array", facts, value.nbytes, memoryview(value.reshape(-1).view(np.uint8)))

    def gather(target: memoryview) -> None:
        if value.size:
            np.copyto(np.frombuffer(target, value.dtype).reshape(value.shape), value)

    return Leaf("array", facts, value.nbytes, None, gather)


def _build_array(facts: list[Any], data: Any, shared: bool) -> Any:
    import numpy as np

    array = np.frombuffer(data, np.dtype(facts[0])).reshape(facts[1])
    return array if shared else array.copy()


def _describe_image(value: Any) -> Leaf:
    raw = value.tobytes()
    palette = value.getpalette("RGBA") if value.mode == "P" else None
    return Leaf("image", [value.mode, list(value.size), palette], len(raw), memoryview(raw))


def _build_image(facts: list[Any], data: Any, shared: bool) -> Any:
    from PIL import Image

    mode, size, palette = facts
    image = Image.frombytes(mode, tuple(size), bytes(data) if mode == "1" else data)
    if palette is not None:
        image.putpalette(palette, "RGBA")
    return image


_DESCRIBE: dict[str, Callable[[Any], Leaf]] = {
    "bytes": _describe_bytes,
    "tensor": _describe_tensor,
    "array": _describe_array,
    "image": _describe_image,
}
_BUILD: dict[str, Callable[[list[Any], Any, bool], Any]] = {
    "bytes": _build_bytes,
    "tensor": _build_tensor,
    "array": _build_array,
    "image": _build_image,
}
