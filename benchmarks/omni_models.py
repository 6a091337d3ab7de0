"""What is measured: checkpoint folders without weights, and the packaged stage configurations with fixed memory.

Every stage gets its KV cache in bytes, so that stages of one GPU start at the same time and none measures what the
others hold. Graphs are captured up to the number of clients.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

GIB = 1 << 30


@dataclass(frozen=True)
class Family:
    """One model family."""

    configs: dict[int, str]
    """Stage configuration by number of GPUs."""
    kv_gib: tuple[float, float]
    """KV cache of thinker and talker."""
    frames_per_second: float
    """Codec frames a second of speech."""
    warm_frames: int
    """Frames of speech after which a stream has had windows of all sizes."""


FAMILIES = {
    "qwen2_5": Family(
        {1: "qwen2_5_omni.yaml", 2: "qwen2_5_omni_2gpu.yaml", 3: "qwen2_5_omni_3gpu.yaml"},
        (12, 12),
        50,
        260,
    ),
    "qwen3": Family(
        {1: "qwen3_omni_moe.yaml", 2: "qwen3_omni_moe_2gpu.yaml", 3: "qwen3_omni_moe_3gpu.yaml"},
        (14, 6),
        12.5,
        86,
    ),
}
MAX_LEN = 8192


def write_model(name: str, folder: Path, tiny: bool) -> Path:
    """Configuration, tokenizer and processor of family ``name``, in the released sizes or tiny ones."""
    if name == "qwen3":
        from vllm_omni.model_executor.tiny_models.qwen3_omni import make_full_size_qwen3_omni, make_tiny_qwen3_omni

        return make_tiny_qwen3_omni(folder) if tiny else make_full_size_qwen3_omni(folder)
    from vllm_omni.model_executor.tiny_models.qwen2_5_omni import make_full_size_qwen2_5_omni, make_tiny_qwen2_5_omni

    return make_tiny_qwen2_5_omni(folder) if tiny else make_full_size_qwen2_5_omni(folder)


def vocabulary(folder: Path) -> dict[str, Any]:
    """Ids of the chat's markers, and how many of the first ids are plain text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {name: int(index) for name, index in tokenizer.get_vocab().items() if name.startswith("<|im_")}
    ids |= {word: tokenizer.encode(word)[0] for word in ("user", "assistant")} | {"newline": tokenizer.encode("\n")[0]}
    return {"ids": ids, "plain": min(tokenizer.added_tokens_decoder)}


def thinker_args(name: str, tiny: bool, kv_gib: float | None = None) -> dict[str, Any]:
    """Engine arguments of the thinker, ours or plain vLLM's."""
    if tiny:
        from vllm_omni.model_executor.tiny_models.stages import AR, SIZES

        return {**SIZES, **AR, "load_format": "dummy", "distributed_executor_backend": "uni"}
    return {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": MAX_LEN,
        "max_num_batched_tokens": MAX_LEN,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": int((kv_gib or FAMILIES[name].kv_gib[0]) * GIB),
        "gpu_memory_utilization": 0.1,  # vLLM wants that much to be free; the KV cache has its own size
        "skip_mm_profiling": True,
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32, 64, 128, 256, 512, 1024]},
    }


def stage_file(
    name: str, gpus: int, folder: Path, tiny: bool, kv_gib: list[float] | None = None, eager: tuple[int, ...] = ()
) -> Path:
    """The packaged stage configuration for ``gpus`` GPUs with fixed memory, written beside the model; stages ``eager``
    run without compilation and graphs."""
    from vllm_omni.model_executor.tiny_models.stages import STAGE_CONFIGS, tiny_stages

    thinker_kv, talker_kv = kv_gib or FAMILIES[name].kv_gib
    config = STAGE_CONFIGS / FAMILIES[name].configs[gpus]
    values = tiny_stages(folder, config.stem) if tiny else yaml.safe_load(config.read_text())
    for stage in values["stage_args"]:
        args = stage["engine_args"]
        args |= {"load_format": "dummy", "worker_extension_cls": "random_weights.RandomWeights"}
        if tiny:
            args |= {"distributed_executor_backend": "uni"}
        elif stage["stage_id"] == 0:
            args |= thinker_args(name, tiny, thinker_kv)
        elif stage["stage_id"] == 1:
            compiled = args.get("compilation_config", {})
            args |= {**thinker_args(name, tiny, talker_kv), "gpu_memory_utilization": 0.05}
            args["compilation_config"] |= compiled
        else:
            args |= {"gpu_memory_utilization": 0.02}
        profiles = os.path.join(os.environ["VLLM_TORCH_PROFILER_DIR"], f"stage_{stage['stage_id']}")
        args["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": profiles,
            "torch_profiler_with_stack": False,
        }
        if stage["stage_id"] in eager:
            args.pop("compilation_config", None)
            args |= {"enforce_eager": True}
    path = folder / "stages.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
