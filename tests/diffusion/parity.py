"""What the parity tests share: the same tiny checkpoint in diffusers and in ours, and how results are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.models.common.images import postprocess_images
from vllm_omni.diffusion.models.common.state import DenoiseState
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

LATENT_TOLERANCE = 1e-4
"""Relative error of final latents, float32."""
STEPS = 3


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' own pipeline."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_ours(folder: Path, **config: Any) -> Any:
    """Our pipeline of one rank on the CPU; the caller's ``init_parallel`` is counted here."""
    od_config = OmniDiffusionConfig.from_kwargs(model=str(folder), device="cpu", **config)
    parallel_state.init_parallel(DiffusionParallelConfig())
    try:
        return DiffusersPipelineLoader(od_config).load_model(torch.device("cpu"))
    except BaseException:
        parallel_state.destroy_parallel()
        raise


def request(prompt: Any, negative: str | None = None, **params: Any) -> OmniDiffusionRequest:
    """A request of one prompt; small and short unless ``params`` say otherwise."""
    values = {"height": 64, "width": 64, "num_inference_steps": STEPS, "max_sequence_length": 64, **params}
    if params.get("sigmas") is not None and "num_inference_steps" not in params:
        del values["num_inference_steps"]
    content = prompt if negative is None else {"prompt": prompt, "negative_prompt": negative}
    return OmniDiffusionRequest([content], OmniDiffusionSamplingParams(**values))


def reference_run(pipe: Any, requests: Sequence[OmniDiffusionRequest], output_type: str = "latent") -> Any:
    """diffusers' result of ``requests`` as one batch, a generator each."""
    params = requests[0].sampling_params
    kwargs: dict[str, Any] = {
        "height": params.height,
        "width": params.width,
        "max_sequence_length": params.max_sequence_length,
        "num_images_per_prompt": params.num_outputs_per_prompt,
        "num_inference_steps": len(params.sigmas) if params.sigmas else params.num_inference_steps,
        "sigmas": params.sigmas,
        "latents": params.latents,
        "output_type": output_type,
    }
    for name in ("guidance_scale", "true_cfg_scale"):
        if getattr(params, name) is not None:
            kwargs[name] = getattr(params, name)
    negatives = [text for request in requests for text in request.negative_texts()]
    generators = [torch.Generator().manual_seed(request.sampling_params.seed or 0) for request in requests]
    return pipe(
        prompt=[text for request in requests for text in request.texts()],
        negative_prompt=None if negatives[0] is None else negatives,
        generator=generators[0] if len(generators) == 1 else generators,
        **kwargs,
    ).images


def start(pipe: Any, req: OmniDiffusionRequest) -> DenoiseState:
    """Check, encode and prepare a request."""
    checked = pipe.check(req)
    state: DenoiseState = pipe.prepare(checked, pipe.encode(checked))
    return state


def batched_run(pipe: Any, requests: Sequence[OmniDiffusionRequest]) -> list[DenoiseState]:
    """Our states of ``requests`` after denoising them together; each leaves the batch when it is done."""
    states = [start(pipe, req) for req in requests]
    assert len({state.batch_key() for state in states}) == 1
    while running := [state for state in states if not state.done]:
        pipe.denoise_step(running)
    return states


def solo_run(pipe: Any, req: OmniDiffusionRequest) -> torch.Tensor:
    """Our final latents of one request."""
    params = replace(req.sampling_params, output_type="latent")
    out: torch.Tensor = pipe(replace(req, sampling_params=params)).output
    return out


def pictures(pipe: Any, req: OmniDiffusionRequest) -> list[Any]:
    """Our pictures of one request."""
    return list(postprocess_images(pipe(req).output))


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    assert ours.shape == reference.shape
    return float((ours.float() - reference.float()).norm() / reference.float().norm())


def assert_same_latents(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = LATENT_TOLERANCE) -> None:
    assert torch.isfinite(reference).all()
    assert relative_error(ours, reference) < tolerance


def assert_same_pictures(ours: Sequence[Any], reference: Sequence[Any]) -> None:
    """At most one level of 255 apart, and the reference is no flat picture."""
    assert len(ours) == len(reference)
    for mine, theirs in zip(ours, reference, strict=True):
        a, b = np.asarray(mine).astype(int), np.asarray(theirs).astype(int)
        assert a.shape == b.shape
        assert b.std() > 5
        assert np.abs(a - b).max() <= 1
