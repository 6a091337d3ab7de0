"""One engine with the fake pipeline for all tests of a module."""

from collections.abc import Iterator

import pytest

from tests.diffusion.helpers import fake_config
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine


@pytest.fixture(scope="module")
def engine() -> Iterator[DiffusionEngine]:
    engine = DiffusionEngine(fake_config(max_num_seqs=4))
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the shared engine holds no request, on either side."""
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        assert not engine.has_work()
        assert engine.call("held") == [[]]
