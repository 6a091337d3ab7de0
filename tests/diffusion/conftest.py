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
) -> Callable[[str], list[dict[str, Any]]]:
    """Results of both ranks of a run with ``name=2`` (such as ``tensor_parallel_size``), all families in one run."""
    import torch
    import torch.multiprocessing

    made: dict[str, list[dict[str, Any]]] = {}

    def run(name: str) -> list[dict[str, Any]]:
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            folders = {family: tiny_folder(family) for family in ("flux", "qwen-image")}
            torch.multiprocessing.spawn(
                rank_runs.run_rank, args=({name: 2}, folders, f"file://{out}/meeting", out), nprocs=2
            )
            made[name] = [torch.load(out / f"rank{rank}.pt") for rank in range(2)]
        return made[name]

    return run
