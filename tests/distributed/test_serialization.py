"""Payloads arrive as they left; what cannot travel is named with its place."""

import math
import random
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vllm_omni.distributed.omni_connectors.utils.arena import Arena
from vllm_omni.distributed.omni_connectors.utils.serialization import (
    Codec,
    LeafRef,
    deserialize_obj,
    leaf_refs,
    register_dataclass,
    resolve,
    serialize_obj,
)
from vllm_omni.errors import ConnectorError, RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
]


def same(a: Any, b: Any) -> bool:
    """Equal, types and all."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a.view(-1) == b.view(-1)).all())
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, Image.Image):
        return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def random_tree(draw: random.Random, depth: int) -> Any:
    """A tree of everything that may travel."""
    leaves = [
        lambda: None,
        lambda: draw.random() < 0.5,
        lambda: draw.randrange(-(2**63), 2**64),
        lambda: draw.choice([0.0, -0.0, 1e300, math.inf, -math.inf, math.nan, draw.random()]),
        lambda: draw.choice(["", "text", "\u00e4\u4f60\U0001f600", "x" * 1000]),
        lambda: draw.randbytes(draw.choice([0, 1, 100, 5000])),
        lambda: torch.randint(0, 2, tuple(draw.choices(range(4), k=draw.randrange(4)))).to(draw.choice(DTYPES[:4])),
        lambda: np.arange(draw.randrange(3000), dtype=draw.choice(["f4", "i8", "u1", "c8", "M8[s]", "U3"][:4])),
        lambda: np.float32(draw.random()),
        lambda: Image.new(draw.choice(["RGB", "L", "RGBA"]), (draw.randrange(1, 40), draw.randrange(1, 40)), 7),
        lambda: {1, 2, 3},
        lambda: draw.choice(DTYPES),
    ]
    if depth == 0 or draw.random() < 0.3:
        return draw.choice(leaves)()
    children = [random_tree(draw, depth - 1) for _ in range(draw.randrange(5))]
    kind = draw.randrange(4)
    if kind == 0:
        return tuple(children)
    if kind == 1:
        return {draw.choice([f"key{i}", i]): child for i, child in enumerate(children)}
    return children


@pytest.mark.parametrize("seed", range(60))
def test_random_trees_come_back(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    tree = random_tree(draw, 4)
    assert same(deserialize_obj(serialize_obj(tree)), tree)
    arena = Arena()
    codec = Codec(arena, threshold=draw.choice([0, 100, 10**9]))
    assert same(codec.decode(b"".join(codec.encode(tree))), tree)
    assert same(resolve(codec.decode(b"".join(codec.encode(tree)), lazy=True)), tree)
    arena.reap()
    assert arena.stats()["busy"] == 0, "everything that was read is free again"
    arena.close()


def test_an_old_reference_gives_nothing_of_the_new_content_up() -> None:
    """Two payloads, one after another in the same segment."""
    arena = Arena()
    old = arena.write(100, lambda content: None)
    arena.cancel(old)
    arena.reap()
    new = arena.write(100, lambda content: None)
    assert (new.fd, new.inode) == (old.fd, old.inode)
    assert not arena.held(old)
    arena.cancel(old)
    arena.release(old)
    assert arena.held(new)
    arena.cancel(new)
    assert not arena.held(new)
    arena.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype(dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2 if dtype is torch.bool else 100, (6, 5, 16), dtype=torch.uint8)
    tensor = raw.view(dtype)
    for item in (tensor, tensor.transpose(0, 1), tensor[::2], tensor[0, 0, 0], tensor[:0]):
        back = deserialize_obj(serialize_obj(item))
        assert (back.dtype, back.shape) == (item.dtype, item.shape)
        assert torch.equal(back.contiguous().view(-1).view(torch.uint8), item.contiguous().view(-1).view(torch.uint8))
        back.zero_()


def test_parameters_and_gradients_travel_as_plain_tensors() -> None:
    back = deserialize_obj(serialize_obj(torch.nn.Parameter(torch.ones(3))))
    assert type(back) is torch.Tensor
    assert not back.requires_grad


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"])
def test_images_of_every_mode(mode: str) -> None:
    base = Image.frombytes("RGB", (13, 7), bytes(range(256)) + bytes(17))
    image = Image.new(mode, (13, 7), 5) if mode == "I;16" else base.convert(mode)
    back = deserialize_obj(serialize_obj(image))
    assert (back.mode, back.size) == (image.mode, image.size)
    assert back.tobytes() == image.tobytes()
    if mode == "P":
        assert back.convert("RGB").tobytes() == image.convert("RGB").tobytes()


def test_an_image_from_a_file(tmp_path: Any) -> None:
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        back = deserialize_obj(serialize_obj({"image": [image]}))["image"][0]
    assert type(back) is Image.Image
    assert back.getpixel((4, 4)) == (1, 2, 3)


def test_generators_continue_where_they_were() -> None:
    generator = torch.Generator("cpu").manual_seed(3)
    torch.rand(5, generator=generator)
    back = deserialize_obj(serialize_obj([generator]))[0]
    assert torch.equal(torch.rand(5, generator=back), torch.rand(5, generator=generator))
    assert back.initial_seed() == 3


def test_sampling_parameters() -> None:
    params = OmniDiffusionSamplingParams(
        height=64,
        sigmas=[1.0, 0.5],
        generator=torch.Generator().manual_seed(1),
        latents=torch.ones(2, 3, dtype=torch.bfloat16),
        extra_args={"a": (1, 2)},
    )
    back = deserialize_obj(serialize_obj(params))
    assert type(back) is OmniDiffusionSamplingParams
    assert (back.height, back.sigmas, back.extra_args, back.num_outputs_per_prompt) == (
        64,
        [1.0, 0.5],
        {"a": (1, 2)},
        1,
    )
    assert same(back.latents, params.latents)
    assert len(serialize_obj(OmniDiffusionSamplingParams())) < 120, "defaults do not travel"


def test_registered_dataclasses() -> None:
    @register_dataclass
    @dataclass
    class Point:
        x: Any
        y: int = 2

    assert deserialize_obj(serialize_obj({"p": Point([1])})) == {"p": Point([1])}

    @dataclass
    class Stranger:
        x: int

    with pytest.raises(RequestError, match=r"p: a .*Stranger cannot travel"):
        serialize_obj({"p": Stranger(1)})


def test_sampling_parameters_of_vllm() -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.3, max_tokens=7, stop=["x"], extra_args={"a": 1})
    back = deserialize_obj(serialize_obj([params]))[0]
    assert type(back) is SamplingParams
    assert (back.temperature, back.max_tokens, back.stop, back.extra_args) == (0.3, 7, ["x"], {"a": 1})
    odd = OmniDiffusionSamplingParams(extra_args={"params": SamplingParams(extra_args={"o": object()})})
    with pytest.raises(RequestError, match=r"extra_args\.params"):
        serialize_obj(odd)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1, {"b": object()}]}, "a.1.b"),
        (OmniDiffusionSamplingParams(extra_args={"foo": threading.Lock()}), "extra_args.foo"),
        ({"a": (1, {2: lambda: 0})}, "a.1.2"),
        ({"a": 2**64}, "a"),
        ({"a": [0, {"b": -(2**63) - 1}]}, "a.1.b"),
        ({"a": "\ud800"}, "a"),
        ({("a", 1): 2}, "value"),
        ({"a": np.array([object()])}, "a"),
        ({"a": np.zeros(2, dtype=[("x", "f4")])}, "a"),
        ({"a": torch.ones(2).to_sparse()}, "a"),
        ({"a": torch.empty(2, device="meta")}, "a"),
        ({"a": 1j}, "a"),
        (OmniDiffusionSamplingParams(seed=2**70), "seed"),
    ],
)
def test_what_cannot_travel_is_named(value: Any, place: str) -> None:
    with pytest.raises(RequestError) as caught:
        serialize_obj(value)
    assert caught.value.details["field"] == place
    assert caught.value.message.startswith(f"{place}: ")


def test_a_tree_that_contains_itself() -> None:
    tree: list[Any] = []
    tree.append(tree)
    with pytest.raises(RequestError, match="contains itself"):
        serialize_obj(tree)


def test_a_refused_payload_leaves_nothing_in_shared_memory() -> None:
    arena = Arena()
    codec = Codec(arena, threshold=10)
    with pytest.raises(RequestError):
        codec.encode({"big": b"x" * 1000, "bad": object()})
    arena.reap()
    assert arena.stats()["busy"] == 0
    arena.close()


@pytest.mark.parametrize("cut", [0, 1, 3, 5, 20, -1])
def test_damaged_payloads(cut: int) -> None:
    whole = serialize_obj({"a": np.arange(100), "b": "text"})
    with pytest.raises(ConnectorError):
        deserialize_obj(whole[:cut] if cut else b"")


def test_a_leaf_can_be_looked_at_without_its_bytes() -> None:
    arena = Arena()
    codec = Codec(arena, threshold=100)
    payload = b"".join(codec.encode({"t": torch.ones(50, 4), "small": torch.ones(1), "i": Image.new("RGB", (90, 80))}))
    assert len(payload) < 400
    data = codec.decode(payload, lazy=True)
    leaf = data["t"]
    assert isinstance(leaf, LeafRef)
    assert (leaf.kind, leaf.shape, leaf.facts[0]) == ("tensor", (50, 4), "float32")
    assert isinstance(data["small"], torch.Tensor)
    assert [item.kind for item in leaf_refs(data)] == ["tensor", "image"]
    assert torch.equal(leaf.load(), torch.ones(50, 4))
    del data, leaf
    arena.close()


def test_what_is_passed_on_reaches_several_readers() -> None:
    maker, middle, reader = Arena(), Arena(), Arena()
    made = Codec(maker, threshold=100).encode({"t": torch.arange(1000)})
    data = Codec(middle, threshold=100).decode(b"".join(made), lazy=True)
    (leaf,) = leaf_refs(data)
    leaf.shared = True
    first = b"".join(Codec(middle).encode(data))
    second = b"".join(Codec(middle).encode(data))
    del data, leaf
    one = Codec(reader).decode(first)["t"]
    one += 1
    two = Codec(reader).decode(second)["t"]
    assert torch.equal(two, torch.arange(1000)), "a reader's writes are its own"
    maker.reap()
    assert maker.stats()["busy"] == 0
    with pytest.raises(ConnectorError, match="already consumed"):
        Codec(reader).decode(first)
    for arena in (maker, middle, reader):
        arena.close()
