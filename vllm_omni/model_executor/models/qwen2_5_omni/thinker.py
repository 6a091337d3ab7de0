"""Thinker stage of Qwen2.5-Omni: vLLM's own model, able to show its inner layers."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.interfaces import SupportsEagle3
from vllm.model_executor.models.qwen2_5_omni_thinker import (
    Qwen2_5OmniThinkerDummyInputsBuilder,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2_5OmniThinkerMultiModalProcessor,
    Qwen2_5OmniThinkerProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_omni.model_executor.models.utils import CheckedSounds


class _ProcessingInfo(CheckedSounds, Qwen2_5OmniThinkerProcessingInfo):
    """vLLM's own, with sounds checked."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5OmniThinkerMultiModalProcessor, info=_ProcessingInfo, dummy_inputs=Qwen2_5OmniThinkerDummyInputsBuilder
)
class Qwen2_5OmniThinkerStage(Qwen2_5OmniThinkerForConditionalGeneration, SupportsEagle3):
    """Text, images, audio and video in, text out; sends its hidden states to the talker."""

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """Rotary positions [3, tokens] of a prompt, and what to add to the index of a later token.

        vLLM's, but for videos that are read with their own sound: there the two markers before share one position, as
        do the two markers after, as in transformers' ``get_rope_index``.
        """
        positions, delta = super().get_mrope_input_positions(input_tokens, mm_features)
        videos = [(at, data) for at, _, data in self.iter_mm_features(mm_features) if data.get("use_audio_in_video")]
        if not videos:
            return positions, delta
        out = positions.clone()
        for audio_bos, data in videos:
            # <vision_bos> <audio_bos> frames and sounds <audio_eos> <vision_eos> text
            begin, start = audio_bos - 1, int(out[0, audio_bos - 1])
            inner, count = self._compute_interleaved_positions(start + 1, data)
            after = begin + count + 4
            out[:, begin : begin + 2] = start
            out[:, begin + 2 : after - 2] = torch.from_numpy(inner)
            end = int(inner[:, -1].max()) + 1  # after the last of them, though earlier ones may stand later
            out[:, after - 2 : after] = end
            if after < len(input_tokens):  # the rest keeps its shape and moves as a whole
                out[:, after:] = positions[:, after:] - positions[0, after] + end + 1
        return out, int(out.max()) + 1 - len(input_tokens)
