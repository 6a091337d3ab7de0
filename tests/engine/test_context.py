"""A checkpoint whose positions do not go together with the context that is asked for, before a process is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from vllm_omni import Omni
from vllm_omni.engine.arg_utils import OmniEngineArgs
from vllm_omni.errors import ConfigError
from vllm_omni.model_executor.tiny_models.qwen2_5_omni import tiny_config


def checkpoint(folder: Path, **positions: Any) -> str:
    """A folder with the configuration alone of a tiny Qwen2.5-Omni; ``positions`` of its thinker and talker."""
    values = tiny_config()
    parts = {"thinker": values["thinker_config"]["text_config"], "talker": values["talker_config"]}
    for name, part in parts.items():
        part["max_position_embeddings"] = positions.get(name, 32768)
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize(
    ("positions", "given", "message"),
    [
        ({"thinker": 300}, {}, r"stage 0: max_model_len=32768: allowed are 1 to 300,"),
        ({"talker": 77}, {"max_model_len": 200}, r"stage 1: max_model_len=200: allowed are 1 to 77,"),
        ({"thinker": 0}, {}, r"stage 0: model=.*: the checkpoint's own context: .*positive"),
        ({"thinker": "many"}, {}, r"model=.*max_position_embeddings.* expected int, got str"),
        ({}, {"max_model_len": -3}, r"stage 0: max_model_len: Input should be greater"),
    ],
)
def test_positions_and_context(tmp_path: Path, positions: dict[str, Any], given: dict[str, Any], message: str) -> None:
    """Without a stage configuration of its own a checkpoint gets the packaged one, of the released sizes."""
    before = children()
    with pytest.raises(ConfigError, match=message) as caught:
        Omni(checkpoint(tmp_path, **positions), **given)
    assert "\n" not in caught.value.message
    assert "pydantic" not in caught.value.message
    if "allowed" in message:
        assert caught.value.details["field"] == "engine_args.max_model_len"
        assert caught.value.details["allowed"] in caught.value.message
    assert children() <= before


def test_another_error_keeps_its_reason(tmp_path: Path) -> None:
    """A context that fits is not to blame."""
    args = {"model": checkpoint(tmp_path), "max_model_len": 16384, "dtype": "float7", "model_stage": "thinker"}
    with pytest.raises(ConfigError, match=r"stage 3: dtype: .*float16"):
        OmniEngineArgs.from_stage(3, "ar", args).create_engine_config()
