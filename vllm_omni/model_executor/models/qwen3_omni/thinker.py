"""Qwen3-Omni's thinker: vLLM's own model under this package's name.

It takes text, images, video and audio and writes text. Inner hidden states leave it through vLLM's auxiliary outputs
(``OmniModelConfig.hidden_layers``). One difference to transformers' ``hidden_states``: after the first layers, as many
as the vision tower has deep-stack levels, vLLM's states include the deep-stack features of image and video positions.
The released talker listens to layer 24 of 48, where both agree.
"""

from __future__ import annotations

from vllm.model_executor.models.qwen3_omni_moe_thinker import (
    Qwen3OmniMoeThinkerDummyInputsBuilder,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerMultiModalProcessor,
    Qwen3OmniMoeThinkerProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_omni.model_executor.models.utils import CheckedSounds


class _ProcessingInfo(CheckedSounds, Qwen3OmniMoeThinkerProcessingInfo):
    """vLLM's own, with sounds checked."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3OmniMoeThinkerMultiModalProcessor, info=_ProcessingInfo, dummy_inputs=Qwen3OmniMoeThinkerDummyInputsBuilder
)
class Qwen3OmniThinkerForConditionalGeneration(Qwen3OmniMoeThinkerForConditionalGeneration):
    """Stage ``thinker``."""
