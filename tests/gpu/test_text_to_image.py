"""On an NVIDIA GPU: the same tiny checkpoint through diffusers and through us, eager and compiled, on every backend."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.tiny_models import make_tiny_model

pytestmark = pytest.mark.gpu

PROMPT = "a cup of coffee on the table"
FAMILIES = ("flux", "qwen-image")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make_tiny_model(family, root / family) for family in FAMILIES}


def reference(folder: Path, family: str, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    import diffusers

    cls = diffusers.FluxPipeline if family == "flux" else diffusers.QwenImagePipeline
    pipe = cls.from_pretrained(folder, torch_dtype=dtype).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    kwargs: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 4, "output_type": "np"}
    kwargs |= {"guidance_scale": 3.5} if family == "flux" else {"true_cfg_scale": 4.0, "negative_prompt": "blurry"}
    return np.asarray(pipe(PROMPT, **kwargs, generator=torch.Generator("cpu").manual_seed(7)).images[0])


def ours(folder: Path, family: str, **engine: Any) -> np.ndarray[Any, Any]:
    params = OmniDiffusionSamplingParams(height=64, width=96, num_inference_steps=4, seed=7, output_type="np")
    prompt: Any = PROMPT
    if family == "flux":
        params.guidance_scale = 3.5
    else:
        params.true_cfg_scale = 4.0
        prompt = {"prompt": PROMPT, "negative_prompt": "blurry"}
    with Omni(model=str(folder), stage_init_timeout=300, **engine) as omni:
        return np.asarray(omni.generate(prompt, params, use_tqdm=False)[0].images[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_float32_gives_the_reference_picture(checkpoints: dict[str, Path], family: str, eager: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    mine = ours(checkpoints[family], family, dtype="float32", attention_backend="SDPA", enforce_eager=eager)
    assert np.abs(mine - reference(checkpoints[family], family, torch.float32)).max() < 2 / 255


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["FLASH_ATTN", "SDPA"])
def test_bfloat16_stays_near_the_reference_of_the_same_dtype(
    checkpoints: dict[str, Path], family: str, backend: str
) -> None:
    mine = ours(checkpoints[family], family, attention_backend=backend, enforce_eager=True)
    theirs = reference(checkpoints[family], family, torch.bfloat16)
    exact = reference(checkpoints[family], family, torch.float32)
    error, reference_error = np.abs(mine - exact).mean(), np.abs(theirs - exact).mean()
    assert error < 2 * reference_error + 1e-3, (error, reference_error)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["tensor_parallel_size", "cfg_parallel_size"])
def test_two_gpus_give_the_same_picture(checkpoints: dict[str, Path], parallel: str) -> None:
    settings: dict[str, Any] = {"dtype": "float32", "attention_backend": "SDPA", "enforce_eager": True}
    alone = ours(checkpoints["qwen-image"], "qwen-image", **settings)
    together = ours(checkpoints["qwen-image"], "qwen-image", parallel_config={parallel: 2}, **settings)
    assert np.abs(alone - together).max() < 2 / 255
