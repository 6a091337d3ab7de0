"""The model families that are graphs of stages on vLLM: what they read and write, and what they are configured by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OmniFamily:
    """One family."""

    architecture: str
    """Class that the released configuration names."""
    model_type: str
    """``model_type`` of the released configuration; the packaged stage configuration of that name is its default."""
    checkpoints: tuple[str, ...]
    """Released checkpoints."""
    reads: tuple[str, ...]
    """Modalities of prompts."""
    writes: tuple[str, ...]
    """Modalities of answers."""


FAMILIES = (
    OmniFamily(
        "Qwen2_5OmniModel",
        "qwen2_5_omni",
        ("Qwen/Qwen2.5-Omni-7B", "Qwen/Qwen2.5-Omni-3B"),
        ("text", "image", "video", "audio"),
        ("text", "audio"),
    ),
    OmniFamily(
        "Qwen3OmniMoeForConditionalGeneration",
        "qwen3_omni_moe",
        ("Qwen/Qwen3-Omni-30B-A3B-Instruct",),
        ("text", "image", "video", "audio"),
        ("text", "audio"),
    ),
)
