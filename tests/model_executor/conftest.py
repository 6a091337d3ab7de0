"""Fixtures of tests that run a stage's model in vLLM's engine."""

from collections.abc import Iterator

import pytest

from tests.ar_support import StageSet


@pytest.fixture(scope="module")
def start_stage() -> Iterator[StageSet]:
    """``start_stage(checkpoint, "ar" | "generation", model_arch=..., ...)`` gives a running ``Stage``. Stages live
    until the end of the module; start each once, in a module-scoped fixture."""
    stages = StageSet()
    yield stages
    stages.close()
