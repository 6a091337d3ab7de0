"""Every tensor of the released, full-size checkpoints has its place, and every parameter gets all of its parts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.models.flux.flux_transformer import FluxTransformer2DModel
from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import QwenImageTransformer2DModel
from vllm_omni.errors import ConfigError

KEYS = Path(__file__).parents[2] / "assets" / "weight_keys"
FAMILIES: dict[str, tuple[Any, dict[str, Any], float]] = {
    # constructor arguments of the released config.json, and billions of parameters
    "flux": (FluxTransformer2DModel, {"guidance_embeds": True}, 11.90),
    "flux-schnell": (FluxTransformer2DModel, {"guidance_embeds": False}, 11.89),
    "qwen-image": (QwenImageTransformer2DModel, {}, 20.43),
}


def released_tensors(family: str) -> dict[str, torch.Tensor]:
    """Names and shapes of the released checkpoint, on the meta device."""
    tensors = {}
    for line in (KEYS / f"{family}.txt").read_text().splitlines():
        match = re.fullmatch(r"(\S+) (\[.*\]) x(\d+)", line)
        if match is None:
            assert line.startswith("#")
            continue
        name, shape, count = match.groups()
        for i in range(int(count)):
            full_name = name.replace(".N.", f".{i}.")
            assert ("N" in name.split(".")) == (int(count) > 1)
            tensors[full_name] = torch.empty(json.loads(shape), device="meta", dtype=torch.bfloat16)
    return tensors


@pytest.fixture(autouse=True)
def _parallel() -> Iterator[None]:
    parallel_state.init_parallel(DiffusionParallelConfig())
    yield
    parallel_state.destroy_parallel()


def build(family: str) -> Any:
    cls, kwargs, _ = FAMILIES[family]
    with parallel_state.vllm_config_context(), torch.device("meta"):
        return cls(**kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_checkpoint_maps_onto_the_model(family: str) -> None:
    model, tensors = build(family), released_tensors(family)
    assert model.load_weights(tensors.items()) == {name for name, _ in model.named_parameters()}
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert numbers == sum(tensor.numel() for tensor in tensors.values())
    assert round(numbers / 1e9, 2) == FAMILIES[family][2]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_missing_part_is_named(family: str) -> None:
    """One tensor of each kind left out: also a third of a stacked matrix is missed."""
    model, tensors = build(family), released_tensors(family)
    kinds = {re.sub(r"\d+", "N", name): name for name in tensors}
    with pytest.raises(ConfigError, match=f"{len(kinds)} weights missing"):
        model.load_weights((name, tensor) for name, tensor in tensors.items() if name not in kinds.values())


@pytest.mark.parametrize("extra", ["proj_out.lora", "transformer_blocks.0.attn.to_q.bias2", "pos_embed.bias"])
def test_a_tensor_without_place_is_named(extra: str) -> None:
    """Also a bias, which vLLM's own loader would pass over."""
    model, tensors = build("flux"), released_tensors("flux")
    tensors[extra] = torch.empty(3, device="meta")
    with pytest.raises(ConfigError, match=re.escape(f"1 tensors have no place: {extra}")):
        model.load_weights(tensors.items())


@pytest.mark.parametrize(
    "name",
    [
        "x_embedder.weight",
        "transformer_blocks.3.attn.norm_q.weight",
        "transformer_blocks.3.norm1.linear.weight",
        "single_transformer_blocks.0.proj_out.weight",
        "transformer_blocks.0.ff.net.2.weight",
        "transformer_blocks.0.attn.to_k.weight",
    ],
)
def test_a_tensor_of_the_wrong_shape_is_named(name: str) -> None:
    model, tensors = build("flux"), released_tensors("flux")
    tensors[name] = torch.empty([size + 2 for size in tensors[name].shape], device="meta")
    with pytest.raises(ConfigError, match=re.escape(name)):
        model.load_weights(tensors.items())
