"""The one payload format: a msgpack header and raw buffers. No pickle.

A payload is a tree of None, bool, int, float, str, list, tuple, set and dict, whose leaves may be torch tensors (any
dtype), numpy arrays, PIL images, bytes, torch generators, dtypes and devices, registered dataclasses and vLLM's
parameter structs. Everything else is refused with a ``RequestError`` that names where it sits.

::

    u32 length of header | header | pad to 16 | buffer | pad to 16 | buffer ...

With a ``LeafStore`` a leaf above the threshold is written into the store and only a reference stands in the header.
A process in the middle decodes with ``lazy=True``: such leaves become ``LeafRef``s, which it can look at and pass on
without touching the bytes. What arrives: tensors on the CPU (whatever device they left), images without their ``info``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import struct
from collections.abc import Callable
from typing import Any

import msgspec

from vllm_omni.distributed.omni_connectors.utils.arena import Arena, Ref
from vllm_omni.distributed.omni_connectors.utils.leaf_ref import LeafRef, leaf_refs, resolve
from vllm_omni.distributed.omni_connectors.utils.leaves import Leaf, build, describe, kind_of
from vllm_omni.errors import ConnectorError, RequestError

__all__ = ["Codec", "LeafRef", "deserialize_obj", "leaf_refs", "register_dataclass", "resolve", "serialize_obj"]

_ALIGN = 16
_TUPLE, _SET, _FROZENSET, _LEAF, _SHARED, _DATACLASS, _STRUCT, _TORCH, _SCALAR = range(1, 10)
_ZEROS = bytes(_ALIGN)
_ATOMS = frozenset({type(None), bool, int, float, str})
_REGISTERED: dict[str, type] = {}
_KNOWN = frozenset({"vllm_omni.inputs.data.OmniDiffusionSamplingParams"})

Buffer = bytes | bytearray | memoryview


def register_dataclass(cls: type) -> type:
    """Let instances of dataclass ``cls`` travel; both sides must have done it. Usable as a decorator."""
    _REGISTERED[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return cls


class _CannotTravel(Exception):
    """Carries the path to the value while the stack unwinds."""

    def __init__(self, reason: str, value: Any) -> None:
        super().__init__(reason)
        self.value = value
        self.path: list[str] = []


_FAULTS = (_CannotTravel, RecursionError, OverflowError, UnicodeEncodeError)
"""What packing and encoding raise for a value that cannot travel."""


class Codec:
    """Encodes and decodes payloads, with or without shared memory behind it."""

    def __init__(self, arena: Arena | None = None, threshold: int = 65536) -> None:
        self.arena = arena
        self.threshold = threshold
        self._reader = _Reader(arena)

    def encode(self, obj: Any, holder: int = 1, refs: list[Ref] | None = None) -> list[Buffer]:
        """Parts of the payload, to be sent one after another; they may be views of what is in ``obj``.

        Args:
            obj: what to encode.
            holder: the process that will read it; 1 when that is not known.
            refs: gets a reference to every leaf that went to shared memory.

        Raises:
            RequestError: something in ``obj`` cannot travel; ``details['field']`` says where it sits.
        """
        packed = self.pack(obj, holder, refs)
        header = packed.encode(packed.tree)
        head = struct.pack("<I", len(header)) + header
        return [head, *([bytes(-len(head) % _ALIGN), *packed.buffers] if packed.buffers else [])]

    def pack(self, obj: Any, holder: int = 1, refs: list[Ref] | None = None) -> Packed:
        """The same for a payload inside of a message, which is encoded with it in one go.

        Raises:
            RequestError: as ``encode``.
        """
        packed = Packed(self, obj, holder, [] if refs is None else refs)
        try:
            packed.tree = packed.walk(obj)
        except _FAULTS as error:
            raise packed.refused(error) from error
        return packed

    def unpack(self, tree: Buffer | msgspec.Raw, buffers: memoryview, lazy: bool = False) -> Any:
        """The object that ``pack`` was given, from its encoded tree and its buffers, which follow one another.

        Raises:
            ConnectorError: as ``decode``.
        """
        try:
            return self._reader.decode(tree, buffers, lazy)
        except (msgspec.DecodeError, ValueError) as error:
            raise ConnectorError(f"damaged payload: {error}") from error

    def decode(self, payload: Buffer, lazy: bool = False) -> Any:
        """The object that ``encode`` was given. With ``lazy``, leaves in shared memory become ``LeafRef``s.

        Raises:
            ConnectorError: the payload is damaged, or a leaf in shared memory is gone.
        """
        view = memoryview(payload)
        try:
            (length,) = struct.unpack_from("<I", view)
            buffers = view[4 + length + -(4 + length) % _ALIGN :]
            return self._reader.decode(view[4 : 4 + length], buffers, lazy)
        except (struct.error, msgspec.DecodeError, ValueError) as error:
            raise ConnectorError(f"damaged payload of {len(view)} bytes: {error}") from error


def serialize_obj(obj: Any) -> bytes:
    """One self-contained buffer with ``obj`` in it."""
    return b"".join(Codec().encode(obj))


def deserialize_obj(data: Buffer) -> Any:
    """The inverse of ``serialize_obj``. Every leaf is copied out once, so ``data`` may be reused."""
    return Codec().decode(data)


class Packed:
    """An object on its way to another process.

    ``walk`` writes any value; the other methods write a value of one kind each, as ``_HANDLERS`` shares them out.

    Attributes:
        tree: what msgpack can encode; where a leaf was stands where its bytes are.
        buffers: bytes of leaves, which follow one another.
        shared: bytes in shared memory that it refers to.
    """

    __slots__ = ("_obj", "_offset", "_refs", "buffers", "codec", "holder", "shared", "tree")

    def __init__(self, codec: Codec, obj: Any, holder: int, refs: list[Ref]) -> None:
        self.codec = codec
        self.holder = holder
        self.buffers: list[Buffer] = []
        self.shared = 0
        self.tree: Any = None
        self._obj = obj
        self._offset = 0
        self._refs = refs

    def encode(self, message: Any) -> bytes:
        """The encoded ``message``, which has the tree in it.

        Raises:
            RequestError: there is a value in it that msgpack cannot hold.
        """
        try:
            return _ENCODER.encode(message)
        except _FAULTS as error:
            raise self.refused(error) from error

    def refused(self, error: Exception) -> RequestError:
        """What ``error``, from packing or encoding, means; gives back what was put into shared memory."""
        for ref in self._refs:
            assert self.codec.arena is not None
            self.codec.arena.release(ref)
        if isinstance(error, _CannotTravel):
            path = ".".join(reversed(error.path)) or "value"
            return RequestError(f"{path}: {error}", field=path, value=repr(error.value)[:200])
        if isinstance(error, RecursionError):
            return RequestError("value: nested too deep, or contains itself", field="value")
        path = _locate(self._obj)
        return RequestError(f"{path}: cannot travel between processes: {error}", field=path)

    def walk(self, obj: Any) -> Any:
        """``obj`` as values that msgpack knows, buffers set aside."""
        kind: type = type(obj)
        if kind in _ATOMS:
            return obj
        handler = _HANDLERS.get(kind) or _handler(kind)
        if handler is None:
            raise _CannotTravel(f"a {kind.__module__}.{kind.__qualname__} cannot travel between processes", obj)
        return handler(self, obj)

    def items(self, obj: Any) -> list[Any]:
        if set(map(type, obj)) <= _ATOMS:
            return list(obj)
        out = []
        for index, value in enumerate(obj):
            try:
                out.append(value if type(value) in _ATOMS else self.walk(value))
            except _CannotTravel as error:
                error.path.append(str(index))
                raise
        return out

    def mapping(self, obj: Any) -> dict[Any, Any]:
        out = {}
        for key, value in obj.items():
            if type(key) is not str and type(key) is not int:
                raise _CannotTravel(f"a {type(key).__name__} as key cannot travel between processes", key)
            try:
                out[key] = value if type(value) in _ATOMS else self.walk(value)
            except _CannotTravel as error:
                error.path.append(str(key))
                raise
        return out

    def leaf(self, obj: Any) -> msgspec.msgpack.Ext:
        cls: type = type(obj)
        kind = kind_of(cls)
        assert kind is not None
        try:
            leaf = describe(kind, obj)
        except (TypeError, ValueError) as error:
            raise _CannotTravel(str(error), obj) from error
        if self.codec.arena is not None and leaf.nbytes > self.codec.threshold:
            ref = self.codec.arena.write(leaf.nbytes, leaf.fill, self.holder)
            self._refs.append(ref)
            self.shared += leaf.nbytes
            return _ext(_SHARED, [kind, leaf.facts, ref, False])
        return self._inline(leaf)

    def _inline(self, leaf: Leaf) -> msgspec.msgpack.Ext:
        buffer: Buffer | None = leaf.view
        if buffer is None:
            buffer = bytearray(leaf.nbytes)
            with memoryview(buffer) as target:
                leaf.fill(target)
        pad = -leaf.nbytes % _ALIGN
        start, self._offset = self._offset, self._offset + leaf.nbytes + pad
        self.buffers += (buffer, _ZEROS[:pad])
        return _ext(_LEAF, [leaf.kind, leaf.facts, start, leaf.nbytes])

    def lent(self, obj: Any) -> msgspec.msgpack.Ext:
        self.shared += obj.ref.nbytes
        return _ext(_SHARED, obj.lend(self.holder))

    def small_bytes(self, obj: Any) -> Any:
        return obj if len(obj) <= self.codec.threshold else self.leaf(obj)

    def dataclass(self, obj: Any) -> msgspec.msgpack.Ext:
        cls: type = type(obj)
        defaults = _defaults(cls)
        values = {name: value for name, value in vars(obj).items() if value is not defaults[name]}
        return _ext(_DATACLASS, [f"{cls.__module__}.{cls.__qualname__}", self.mapping(values)])

    def struct(self, obj: Any) -> msgspec.msgpack.Ext:
        name = f"{type(obj).__module__}.{type(obj).__qualname__}"
        try:
            return _ext(_STRUCT, [name, _ENCODER.encode(obj)])
        except (TypeError, NotImplementedError) as error:
            raise _CannotTravel(str(error), obj) from error

    def generator(self, obj: Any) -> msgspec.msgpack.Ext:
        return _ext(_TORCH, ["generator", str(obj.device), obj.get_state().numpy().tobytes()])


@functools.cache
def _defaults(cls: type) -> dict[str, Any]:
    """Default of each field of a dataclass; a value that is its default need not travel."""
    return {spec.name: spec.default for spec in dataclasses.fields(cls)}


def _ext(code: int, words: list[Any]) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, _ENCODER.encode(words))


_ENCODER = msgspec.msgpack.Encoder()

_HANDLERS: dict[type, Callable[[Packed, Any], Any]] = {
    dict: Packed.mapping,
    list: Packed.items,
    tuple: lambda writer, obj: _ext(_TUPLE, writer.items(obj)),
    set: lambda writer, obj: _ext(_SET, writer.items(obj)),
    frozenset: lambda writer, obj: _ext(_FROZENSET, writer.items(obj)),
    bytes: Packed.small_bytes,
    LeafRef: Packed.lent,
}


@functools.cache
def _handler(cls: type) -> Callable[[Packed, Any], Any] | None:
    """How values of a class that is not in ``_HANDLERS`` travel; None when they cannot."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    if kind_of(cls) is not None:
        return Packed.leaf
    if name in _KNOWN or _REGISTERED.get(name) is cls:
        return Packed.dataclass
    if issubclass(cls, msgspec.Struct) and name.startswith("vllm."):
        return Packed.struct
    if cls.__module__.startswith("torch"):
        if cls.__name__ == "Generator":
            return Packed.generator
        if cls.__name__ in ("dtype", "device"):
            return lambda writer, obj: _ext(_TORCH, [cls.__name__, str(obj).removeprefix("torch.")])
    if any(base.__module__ == "numpy" and base.__name__ == "generic" for base in cls.__mro__):
        return lambda writer, obj: _ext(_SCALAR, [obj.dtype.str, obj.tobytes()])
    for base, handler in ((dict, _HANDLERS[dict]), (list, _HANDLERS[list]), (tuple, _HANDLERS[tuple])):
        if issubclass(cls, base):
            return handler
    return None


class _Reader:
    def __init__(self, arena: Arena | None) -> None:
        self.arena = arena
        self.buffers = memoryview(b"")
        self.lazy = False
        self._decoder = msgspec.msgpack.Decoder(ext_hook=self.ext, strict=False)

    def decode(self, header: Buffer | msgspec.Raw, buffers: memoryview, lazy: bool) -> Any:
        self.buffers, self.lazy = buffers, lazy
        try:
            return self._decoder.decode(header)
        finally:
            self.buffers = memoryview(b"")

    def ext(self, code: int, data: memoryview) -> Any:
        words = self._decoder.decode(data)
        if code == _LEAF:
            kind, facts, start, nbytes = words
            buffer = self.buffers[start : start + nbytes]
            if len(buffer) != nbytes:
                raise ValueError("a buffer is cut off")
            return build(kind, facts, buffer, shared=False)
        if code == _SHARED:
            return self._shared(*words)
        if code in (_TUPLE, _SET, _FROZENSET):
            return {_TUPLE: tuple, _SET: set, _FROZENSET: frozenset}[code](words)
        if code == _DATACLASS:
            return _resolve_type(words[0])(**words[1])
        if code == _STRUCT:
            return msgspec.msgpack.decode(words[1], type=_resolve_type(words[0]))
        if code == _TORCH:
            return _build_torch(*words)
        if code == _SCALAR:
            import numpy as np

            return np.frombuffer(words[1], np.dtype(words[0]))[0]
        raise ValueError(f"unknown extension {code}")

    def _shared(self, kind: str, facts: list[Any], ref: list[int], several: bool) -> Any:
        arena = self.arena
        if arena is None:
            raise ConnectorError("a payload with shared memory needs the connector that made it")
        leaf = LeafRef(kind, facts, Ref(*ref), arena)
        leaf.shared = several
        return leaf if self.lazy else leaf.load()


def _build_torch(kind: str, text: str, state: bytes = b"") -> Any:
    import torch

    if kind == "dtype":
        return getattr(torch, text)
    if kind == "device":
        return torch.device(text)
    generator = torch.Generator(text)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


def _resolve_type(name: str) -> Any:
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in _KNOWN and not name.startswith("vllm."):
        raise ConnectorError(f"type {name} is not registered in this process")
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _locate(obj: Any) -> str:
    """Path of the first value that msgpack refuses (an integer beyond 64 bits, a lone surrogate)."""
    children: Any = ()
    if isinstance(obj, dict):
        children = obj.items()
    elif isinstance(obj, (list, tuple, set, frozenset)):
        children = enumerate(obj)
    elif dataclasses.is_dataclass(obj):
        children = vars(obj).items()
    for key, value in children:
        try:
            Codec().encode(value)
        except RequestError as error:
            below = error.details["field"]
            return str(key) if below == "value" else f"{key}.{below}"
    return "value"
