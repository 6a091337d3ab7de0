"""What several tests of the entrypoints need."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Lines that the package logs at INFO and above."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm_omni")
    level = logger.level
    logger.setLevel("INFO")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)
