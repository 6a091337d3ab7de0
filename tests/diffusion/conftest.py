"""Tiny checkpoints, made once a session, and the pipelines on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.diffusion import parity, rank_runs
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny checkpoint of a family."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(scope="session")
def reference_pipe(tiny_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """diffusers' pipeline of a family."""
    made: dict[str, Any] = {}

    def pipe(family: str) -> Any:
        if family not in made:
            made[family] = parity.load_reference(tiny_folder(family))
        return made[family]

    return pipe


@pytest.fixture(scope="module")
def our_pipe(tiny_folder: Callable[[str], Path]) -> Iterator[Callable[[str], Any]]:
    """Our pipeline of a family, one rank; its process groups are gone after the module."""
    made: dict[str, Any] = {}

    def pipe(family: str) -> Any:
        if family not in made:
            made[family] = parity.load_ours(tiny_folder(family))
        return made[family]

    yield pipe
    for _ in made:
        parallel_state.destroy_parallel()


@pytest.fixture(scope="session")
def two_ranks(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Results of both ranks, by what is 2 (such as ``tensor_parallel_size``): all kinds and families in one run."""
    import torch
    import torch.multiprocessing

    out = tmp_path_factory.mktemp("two_ranks")
    folders = {family: tiny_folder(family) for family in ("flux", "qwen-image")}
    torch.multiprocessing.spawn(rank_runs.run_rank, args=(rank_runs.RANK_KINDS, folders, out), nprocs=2)
    ranks = [torch.load(out / f"rank{rank}.pt") for rank in range(2)]
    return {kind: [rank[kind] for rank in ranks] for kind in rank_runs.RANK_KINDS}
