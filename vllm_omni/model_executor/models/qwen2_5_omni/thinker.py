"""Thinker stage of Qwen2.5-Omni: vLLM's own model, able to show its inner layers."""

from vllm.model_executor.models.interfaces import SupportsEagle3
from vllm.model_executor.models.qwen2_5_omni_thinker import Qwen2_5OmniThinkerForConditionalGeneration


class Qwen2_5OmniThinkerStage(Qwen2_5OmniThinkerForConditionalGeneration, SupportsEagle3):
    """Text, images, audio and video in, text out; sends its hidden states to the talker."""
