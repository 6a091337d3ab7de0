"""Every registered model with every feature: it works as the table says, or is refused with a ConfigError."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.diffusion.parity import assert_same_latents, load_ours, request, solo_run
from tests.diffusion.rank_runs import denoise
from vllm_omni.diffusion import registry
from vllm_omni.diffusion.compile import compile_repeated_blocks
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.models.common.transformer import Streams
from vllm_omni.diffusion.models.interface import SupportsStepExecution
from vllm_omni.errors import ConfigError

TINY = {"FluxPipeline": "flux", "QwenImagePipeline": "qwen-image"}
MODELS = sorted(registry.supported_models())
PARALLEL = {
    "tensor_parallel": "tensor_parallel_size",
    "cfg_parallel": "cfg_parallel_size",
    "ulysses": "ulysses_degree",
    "ring": "ring_degree",
    "pipeline_parallel": "pipeline_parallel_size",
    "data_parallel": "data_parallel_size",
}


def test_tables_agree() -> None:
    """Every model has a row in each table it needs, a class behind it, and a tiny checkpoint here."""
    assert set(MODELS) == set(registry._DIFFUSION_MODELS) == set(registry._DIFFUSION_POST_PROCESS_FUNCS) == set(TINY)
    assert set(PARALLEL) < set(registry.feature_names())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("feature", PARALLEL)
def test_parallelism(
    feature: str,
    model: str,
    tiny_folder: Callable[[str], Path],
    two_ranks: dict[str, list[dict[str, Any]]],
    our_pipe: Callable[[str], Any],
) -> None:
    family, field = TINY[model], PARALLEL[feature]
    od_config = OmniDiffusionConfig.from_kwargs(model=str(tiny_folder(family)), device="cpu", **{field: 2})
    if getattr(registry.supported_models()[model], feature):
        registry.check_features(od_config)
        for mine, expected in zip(two_ranks[field][0][family]["latents"], denoise(our_pipe(family)), strict=True):
            assert_same_latents(mine, expected)
    else:
        with pytest.raises(ConfigError, match=rf"{field}=2: {model} does not support {feature}"):
            registry.check_features(od_config)


@pytest.mark.parametrize("model", MODELS)
def test_heads_must_divide_by_the_ranks(model: str, tiny_folder: Callable[[str], Path]) -> None:
    od_config = OmniDiffusionConfig.from_kwargs(
        model=str(tiny_folder(TINY[model])), device="cpu", tensor_parallel_size=3
    )
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=3: .* has 4 attention heads; allowed are 1, 2, 4"):
        registry.check_features(od_config)


@pytest.mark.parametrize("model", MODELS)
def test_compile(model: str, tiny_folder: Callable[[str], Path], our_pipe: Callable[[str], Any]) -> None:
    """The repeated blocks compile without a break in their graph, with and without a mask, and change nothing."""
    pipe = load_ours(tiny_folder(TINY[model]))
    try:
        od_config = pipe.od_config
        assert compile_repeated_blocks(pipe, od_config) == 0  # a CPU does not compile by itself
        eager = OmniDiffusionConfig.from_kwargs(model=od_config.model, device="cpu", enforce_eager=True)
        assert compile_repeated_blocks(pipe, eager, backend="eager") == 0
        blocks = sum(type(m).__name__ in pipe.transformer._repeated_blocks for m in pipe.modules())
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        assert compile_repeated_blocks(pipe, od_config, backend="eager") == blocks > 0
        for mine, expected in zip(denoise(pipe), denoise(our_pipe(TINY[model])), strict=True):
            assert_same_latents(mine, expected, 1e-5)
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] > 0
        assert not counters["graph_break"], dict(counters["graph_break"])
    finally:
        torch._dynamo.reset()
        parallel_state.destroy_parallel()


@pytest.mark.parametrize("model", MODELS)
def test_compiled_region_must_exist(model: str, tiny_folder: Callable[[str], Path]) -> None:
    class Empty(torch.nn.Module):
        _repeated_blocks = ("NoSuchBlock",)

    od_config = OmniDiffusionConfig.from_kwargs(model=str(tiny_folder(TINY[model])), device="cpu")
    with pytest.raises(ConfigError, match="NoSuchBlock"):
        compile_repeated_blocks(Empty(), od_config, backend="eager")


@pytest.mark.parametrize("model", MODELS)
def test_interface(model: str, our_pipe: Callable[[str], Any]) -> None:
    """Runs step by step; the plans of its transformer name fields of ``Streams``; whole runs give an output."""
    pipe = our_pipe(TINY[model])
    assert isinstance(pipe, SupportsStepExecution)
    for fields in pipe.transformer._sp_plan.values():
        assert set(fields) <= set(Streams.__dataclass_fields__)
    out = pipe(request("a red fox", seed=1))
    assert isinstance(out, DiffusionOutput)
    assert out.metrics["seed"] == 1
    post_process = registry.get_diffusion_post_process_func(pipe.od_config)
    assert post_process is not None
    assert post_process(out.output)[0].size == (64, 64)
    assert registry.get_diffusion_pre_process_func(pipe.od_config) is None
    shown = [state.step_index for state in pipe.denoise(_start(pipe))]
    assert shown == [1, 2, 3]
    assert torch.isfinite(solo_run(pipe, request("a red fox", seed=1))).all()


def _start(pipe: Any) -> Any:
    checked = pipe.check(request("a red fox", seed=1))
    return pipe.prepare(checked, pipe.encode(checked))


@pytest.mark.parametrize("name", ["FluxPipelin", "QwenImageLayeredPipeline", "Nothing"])
def test_unknown_model(name: str, tmp_path: Path) -> None:
    """The error lists what is supported and, when there is one, the nearest name."""
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{name}"}}')
    od_config = OmniDiffusionConfig.from_kwargs(model=str(tmp_path), device="cpu")
    with pytest.raises(ConfigError, match="supported are FluxPipeline, QwenImagePipeline") as caught:
        registry.resolve_pipeline_class(od_config)
    if name == "FluxPipelin":
        assert "did you mean 'FluxPipeline'" in str(caught.value)


def test_no_such_checkpoint() -> None:
    od_config = OmniDiffusionConfig.from_kwargs(model="nobody/nothing", device="cpu")
    with pytest.raises(ConfigError, match="neither a folder nor a checkpoint in the local hub cache"):
        registry.resolve_pipeline_class(od_config)


def test_the_registry_imports_no_model() -> None:
    code = "import sys, vllm_omni.diffusion.registry; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
