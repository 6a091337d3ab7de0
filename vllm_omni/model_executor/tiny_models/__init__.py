"""Makers of tiny random checkpoints in the released layout, for tests and for trying an installation out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

_MODULE = "vllm_omni.model_executor.tiny_models"
FAMILIES = {
    "qwen2.5-omni": (f"{_MODULE}.qwen2_5_omni", "make_tiny_qwen2_5_omni"),
    "qwen3-omni": (f"{_MODULE}.qwen3_omni", "make_tiny_qwen3_omni"),
}
"""Family -> module and function."""


def make_tiny_omni(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny checkpoint of ``family`` into ``folder``, and beside it ``stages.yaml``, with which it runs on a
    CPU; returns that file."""
    from vllm_omni.model_executor.tiny_models.stages import write_tiny_stages

    module, name = FAMILIES[family]
    make: Callable[..., Path] = getattr(importlib.import_module(module), name)
    return write_tiny_stages(make(folder, seed=seed))
