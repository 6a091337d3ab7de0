"""Loading: registry, random weights, classes that the user names; nothing missing and nothing left over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.models.utils import AutoWeightsLoader

from tests.diffusion.parity import assert_same_latents, request, solo_run
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.data import DiffusionOutput, DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.models.flux.pipeline_flux import FluxPipeline
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

HERE = "tests.diffusion.model_loader.test_diffusers_loader"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _parallel() -> Iterator[None]:
    parallel_state.init_parallel(DiffusionParallelConfig())
    yield
    parallel_state.destroy_parallel()


def load(folder: Path, **config: Any) -> Any:
    od_config = OmniDiffusionConfig.from_kwargs(model=str(folder), device="cpu", **config)
    return DiffusersPipelineLoader(od_config).load_model(CPU)


@pytest.fixture
def copy_of(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of the test's own, to be damaged."""
    return lambda family: shutil.copytree(tiny_folder(family), tmp_path / family)


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path)), path)


class TracingFlux(FluxPipeline):
    """Custom pipeline as users write them: wraps ``forward``."""

    def forward(self, req: Any, prompt: Any = None, negative_prompt: Any = None, **kwargs: Any) -> DiffusionOutput:
        out = super().forward(req=req, prompt=prompt, negative_prompt=negative_prompt, **kwargs)
        out.metrics["traced"] = req.sampling_params.num_inference_steps
        return out


class OutsideTransformer(nn.Module):
    """Small model in the style of the guide: vLLM's linear layers and the package's attention."""

    def __init__(self, od_config: OmniDiffusionConfig) -> None:
        super().__init__()
        self.proj = ColumnParallelLinear(8, 8, bias=True, return_bias=False)
        self.attn = Attention(num_heads=2, head_size=4, softmax_scale=0.5, causal=False, num_kv_heads=2)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x_BSHD = self.proj(x_BSD).unflatten(-1, (2, 4))
        return self.attn(x_BSHD, x_BSHD, x_BSHD).flatten(2)


class OutsidePipeline(nn.Module):
    """Out-of-tree pipeline with its own ``forward`` and vLLM's AutoWeightsLoader."""

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.device = get_local_device()
        self.transformer = OutsideTransformer(od_config)
        self.weights_sources = [
            DiffusersPipelineLoader.ComponentSource(
                model_or_path=od_config.model,
                subfolder="transformer",
                revision=None,
                prefix="transformer.",
                fall_back_to_pt=True,
            )
        ]

    def forward(self, req: OmniDiffusionRequest) -> DiffusionOutput:
        size = req.sampling_params.height or 8
        return DiffusionOutput(self.transformer(torch.ones(1, size, 8, device=self.device)))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)


class OutsidePictures(OutsidePipeline):
    """The same, as pictures in [-1, 1]."""

    def forward(self, req: OmniDiffusionRequest) -> DiffusionOutput:
        return DiffusionOutput(super().forward(req).output[:, None].expand(-1, 3, -1, -1) - 1)


class SourcesOfTheClass(OutsidePictures):
    """Its ``weights_sources`` are no attribute of the instance."""

    weights_sources = property(
        lambda self: [DiffusersPipelineLoader.ComponentSource(self.folder, "transformer", None, "transformer.")],
        lambda self, sources: setattr(self, "folder", sources[0].model_or_path),
    )


not_a_class = "text"


@pytest.fixture
def outside_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "OutsidePipeline"}')
    save_file(
        {"proj.weight": torch.eye(8), "proj.bias": torch.full((8,), 0.5)},
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    return folder


def load_outside(folder: Path) -> Any:
    return load(
        folder,
        diffusion_load_format="custom_pipeline",
        custom_pipeline_args={"pipeline_class": f"{HERE}.OutsidePipeline"},
    )


def test_out_of_tree_pipeline(outside_folder: Path) -> None:
    pipe = load_outside(outside_folder)
    out = pipe(OmniDiffusionRequest(["x"], OmniDiffusionSamplingParams(height=16))).output
    assert torch.allclose(out, torch.full((1, 16, 8), 1.5))


@pytest.mark.parametrize("name", ["OutsidePictures", "SourcesOfTheClass"])
def test_out_of_tree_pipeline_in_an_engine(outside_folder: Path, name: str) -> None:
    """Of a checkpoint whose class no table knows."""
    custom = {"pipeline_class": f"{HERE}.{name}"}
    engine = DiffusionEngine(
        OmniDiffusionConfig.from_kwargs(model=str(outside_folder), device="cpu", custom_pipeline_args=custom)
    )
    try:
        request = OmniDiffusionRequest(["x"], OmniDiffusionSamplingParams(height=16, output_type="pt"))
        (chunk,) = engine.generate([request])
    finally:
        engine.close()
    assert torch.allclose(torch.as_tensor(chunk.data["images"][0]), torch.full((3, 16, 8), 0.75))
    with pytest.raises(ConfigError, match="no diffusion model 'OutsidePipeline'"):
        DiffusionEngine(OmniDiffusionConfig.from_kwargs(model=str(outside_folder), device="cpu"))


def test_out_of_tree_pipeline_is_checked_too(outside_folder: Path) -> None:
    """Also a bias without a place, which AutoWeightsLoader passes over, and a parameter that did not come."""
    path = outside_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    edit_tensors(path, lambda tensors: {**tensors, "other.bias": torch.zeros(3)})
    with pytest.raises(ConfigError, match=r"transformer\.other"):
        load_outside(outside_folder)
    edit_tensors(path, lambda tensors: {"attn.bias": torch.zeros(3), **{k: tensors[k] for k in tensors if "proj" in k}})
    with pytest.raises(ConfigError, match=r"1 tensors have no place: transformer\.attn\.bias"):
        load_outside(outside_folder)
    edit_tensors(path, lambda tensors: {"proj.weight": tensors["proj.weight"]})
    with pytest.raises(ConfigError, match=r"1 weights missing: transformer\.proj\.bias"):
        load_outside(outside_folder)


def test_custom_pipeline_wraps_forward(tiny_folder: Callable[[str], Path], our_pipe: Callable[[str], Any]) -> None:
    args = {"pipeline_class": f"{HERE}.TracingFlux"}
    pipe = load(tiny_folder("flux"), diffusion_load_format="custom_pipeline", custom_pipeline_args=args)
    out = pipe(request("a red fox", seed=1, output_type="latent"))
    assert out.metrics["traced"] == 3
    assert torch.equal(out.output, solo_run(our_pipe("flux"), request("a red fox", seed=1)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module.Pipeline", "cannot import no_such_module"),
        (f"{HERE}.Missing", "has no 'Missing'"),
        (f"{HERE}.not_a_class", "not a class"),
        ("Pipeline", 'expected "module.Class"'),
        (3, 'expected "module.Class"'),
    ],
)
def test_custom_pipeline_that_is_none(name: Any, message: str, tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        load(
            tiny_folder("flux"), diffusion_load_format="custom_pipeline", custom_pipeline_args={"pipeline_class": name}
        )


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
def test_dummy_weights(family: str, copy_of: Callable[[str], Path]) -> None:
    """No weight file is needed; the same numbers every time; every input matters."""
    folder = copy_of(family)
    for path in folder.rglob("*.safetensors*"):
        path.unlink()
    pipe, again = (load(folder, diffusion_load_format="dummy") for _ in range(2))
    guided = {"negative": "blurry", "true_cfg_scale": 3.0, "seed": 1}
    base = solo_run(pipe, request("a red fox", **guided))
    assert torch.isfinite(base).all()
    assert torch.equal(base, solo_run(again, request("a red fox", **guided)))
    for other in (request("two cats", **guided), request("a red fox", seed=1), request("a red fox", seed=2)):
        assert (solo_run(pipe, other) - base).abs().max() > 1e-3
    assert all(parameter.std() > 0 for name, parameter in pipe.named_parameters() if parameter.numel() > 1)


def test_weights_of_one_file_and_of_many_are_the_same(
    copy_of: Callable[[str], Path], our_pipe: Callable[[str], Any]
) -> None:
    """The tiny transformer is sharded with an index, as the released one; one file loads as well."""
    folder = copy_of("flux") / "transformer"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    merged = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for path in [*shards, folder / "diffusion_pytorch_model.safetensors.index.json"]:
        path.unlink()
    save_file(merged, folder / "diffusion_pytorch_model.safetensors")
    req = request("a red fox", seed=1)
    assert torch.equal(solo_run(load(folder.parent), req), solo_run(our_pipe("flux"), req))


@pytest.mark.parametrize(
    ("family", "part"), [("flux", "text_encoder"), ("flux", "vae"), ("qwen-image", "text_encoder")]
)
def test_missing_and_unexpected_tensors_of_every_part(family: str, part: str, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(family)
    path = next((folder / part).glob("*.safetensors"))
    gone = sorted(load_file(path))[0]
    edit_tensors(
        path, lambda tensors: {"strange.bias": torch.zeros(2), **{k: v for k, v in tensors.items() if k != gone}}
    )
    with pytest.raises(ConfigError, match=rf"{part}.*1 weights missing.*1 tensors have no place: strange.bias"):
        load(folder)


@pytest.mark.parametrize(
    ("family", "old", "new"), [("flux", "", "text_model."), ("qwen-image", "model.", "model.language_model.")]
)
def test_text_encoders_of_older_and_newer_libraries(
    family: str, old: str, new: str, copy_of: Callable[[str], Path], our_pipe: Callable[[str], Any]
) -> None:
    """The released names and those that newer versions write, and both forms of config.json."""
    folder = copy_of(family)
    path = next((folder / "text_encoder").glob("*.safetensors"))

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            new + name.removeprefix(old) if name.startswith(old) and not name.startswith(new) else name: tensor
            for name, tensor in tensors.items()
        }

    edit_tensors(path, rename)
    pipe = load(folder)
    pipe.text_encoder.config.save_pretrained(folder / "text_encoder")
    written = json.loads((folder / "text_encoder" / "config.json").read_text())
    assert "torch_dtype" not in written
    req = request("a red fox", seed=1)
    expected = solo_run(our_pipe(family), req)
    assert_same_latents(solo_run(pipe, req), expected, 1e-6)
    assert_same_latents(solo_run(load(folder), req), expected, 1e-6)


def test_damage_is_reported(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("flux")
    shard = sorted((folder / "transformer").glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="damaged safetensors"):
        load(folder)
    shard.unlink()
    with pytest.raises(ConfigError, match=f"not there: {shard.name}"):
        load(folder)
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text('{"use_karras_sigmas": true}')
    with pytest.raises(ConfigError, match="use_karras_sigmas"):
        load(folder)


def test_a_transformer_option_that_is_not_known_is_refused(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("qwen-image")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "zero_cond_t": True}))
    with pytest.raises(ConfigError, match="zero_cond_t"):
        load(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), "zero_cond_t": False, "new_option": 3}))
    with pytest.raises(ConfigError, match="new_option"):
        load(folder)


def test_layers_are_in_the_stages_dtype(tiny_folder: Callable[[str], Path]) -> None:
    pipe = load(tiny_folder("qwen-image"), dtype="bfloat16")
    assert {parameter.dtype for parameter in pipe.parameters() if parameter.numel()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert not any(parameter.requires_grad for parameter in pipe.parameters())
