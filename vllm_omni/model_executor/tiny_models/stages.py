"""Stage configurations of tiny checkpoints: the packaged ones with small sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

STAGE_CONFIGS = Path(__file__).parent.parent / "stage_configs"
SIZES = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "kv_cache_memory_bytes": 16 << 20}
"""Engine arguments of every stage."""
AR = {"enforce_eager": True, "skip_mm_profiling": True}
"""Those of autoregressive stages besides: what takes long to prepare and tiny models gain nothing from."""
_OF_LARGE_ONES = ("gpu_memory_utilization", "max_num_batched_tokens")
_STEPS = {"thinker": 32, "talker": 64}
"""The most that a stage makes: a random model ends nothing by itself."""


def tiny_stages(checkpoint: Path, name: str | None = None) -> dict[str, Any]:
    """The packaged configuration ``name`` (default: the checkpoint's model type) for a tiny checkpoint, on any device.

    Returns:
        What its YAML holds, to be changed or written.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    values: dict[str, Any] = yaml.safe_load((STAGE_CONFIGS / f"{name or config['model_type']}.yaml").read_text())
    for stage in values["stage_args"]:
        args = {key: value for key, value in stage["engine_args"].items() if key not in _OF_LARGE_ONES} | SIZES
        if stage["stage_type"] == "ar":
            args |= AR
            stage["default_sampling_params"]["max_tokens"] = _STEPS[args["model_stage"]]
        talker = config["talker_config"]
        if "accept_hidden_layer" in talker and "hidden_layers" in args:
            args["hidden_layers"] = [talker["accept_hidden_layer"]]
        if "codec_eos_token_id" in talker and args["model_stage"] == "talker":
            stage["default_sampling_params"]["stop_token_ids"] = [talker["codec_eos_token_id"]]
        stage["engine_args"] = args
    return values


def write_tiny_stages(checkpoint: Path) -> Path:
    """Write ``stages.yaml`` into the checkpoint's folder."""
    path = checkpoint / "stages.yaml"
    text = yaml.safe_dump(tiny_stages(checkpoint), sort_keys=False)
    path.write_text(f"# The packaged configuration with the sizes of this tiny checkpoint.\n{text}")
    return path
