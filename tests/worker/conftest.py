"""Fixtures of tests that run stages in this process."""

from tests.model_executor.conftest import start_stage

__all__ = ["start_stage"]
