"""Tiny checkpoints, made once a session, and the pipelines on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.diffusion import parity
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


@pytest.fixture(scope="session")
def our_pipe(tiny_folder: Callable[[str], Path]) -> Iterator[Callable[[str], Any]]:
    """Our pipeline of a family, one rank."""
    made: dict[str, Any] = {}

    def pipe(family: str) -> Any:
        if family not in made:
            made[family] = parity.load_ours(tiny_folder(family))
        return made[family]

    yield pipe
    for _ in made:
        parallel_state.destroy_parallel()
