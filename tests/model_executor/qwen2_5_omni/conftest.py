"""The tiny checkpoint and transformers' model of it, made once."""

from pathlib import Path

import pytest

from tests.model_executor.qwen2_5_omni.support import Reference
from vllm_omni.model_executor.tiny_models.qwen2_5_omni import make_tiny_qwen2_5_omni


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen2_5_omni(tmp_path_factory.mktemp("qwen2_5_omni"))


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)
