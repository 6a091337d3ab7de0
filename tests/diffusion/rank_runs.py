"""What each rank of a two-rank test does, importable by spawned processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.diffusion.parity import batched_run, request
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

RANK_KINDS = ("tensor_parallel_size", "cfg_parallel_size")
REQUESTS = (
    {"prompt": "a red fox", "negative": "blurry", "seed": 3, "true_cfg_scale": 3.0},
    {"prompt": "A cup of coffee on the table.", "negative": "bad hands, text", "seed": 4, "true_cfg_scale": 2.0},
)


def denoise(pipe: Any) -> list[torch.Tensor]:
    """Final latents of ``REQUESTS`` in one batch, and of an unguided one."""
    states = batched_run(pipe, [request(**values) for values in REQUESTS])
    return [state.latents for state in [*states, *batched_run(pipe, [request("two cats", seed=5)])]]


def run_rank(rank: int, kinds: Sequence[str], folders: dict[str, Path], out: Path) -> None:
    """Join a grid of every kind, one after another, run every family in it, write the latents of each rank."""
    torch.set_num_threads(1)
    results = {}
    for kind in kinds:
        results[kind] = _run_kind(rank, kind, folders, f"file://{out}/{kind}")
        assert not parallel_state.is_initialized()
    torch.save(results, out / f"rank{rank}.pt")


def _run_kind(rank: int, kind: str, folders: dict[str, Path], meeting: str) -> dict[str, dict[str, Any]]:
    results = {}
    for family, folder in folders.items():
        od_config = OmniDiffusionConfig.from_kwargs(model=str(folder), device="cpu", **{kind: 2})
        # Every family joins anew: the second call finds the groups of the first.
        parallel_state.init_parallel(
            od_config.parallel_config, rank=rank, local_rank=rank, init_method=meeting, backend="gloo", timeout_s=120
        )
        pipe = DiffusersPipelineLoader(od_config).load_model(torch.device("cpu"))
        forwards: list[int] = []
        pipe.transformer.register_forward_pre_hook(lambda _, args, seen=forwards: seen.append(len(args[0].latents_BSC)))
        results[family] = {"latents": denoise(pipe), "rows": forwards, "params": local_parameters(pipe)}
    for _ in folders:
        parallel_state.destroy_parallel()
    return results


def local_parameters(pipe: Any) -> int:
    """Numbers in the transformer's modulation on this rank (the linears' own weights are repacked on a CPU)."""
    return int(pipe.transformer.modulation.weight.numel())
