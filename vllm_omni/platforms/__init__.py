"""Facts about devices."""

from vllm_omni.platforms.interface import Platform, get_platform

__all__ = ["Platform", "get_platform"]
