"""Stage ``code2wav``: windows of codes in, samples out. See ``vocoder`` for what a window has to bring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_omni.errors import RequestError
from vllm_omni.model_executor.layers.dense import load_dense_weights
from vllm_omni.model_executor.models.interfaces import OmniRequestState
from vllm_omni.model_executor.models.qwen3_omni.vocoder import CodeWindow, Vocoder
from vllm_omni.model_executor.models.utils import OnePassModel

SAMPLE_RATE = 24000


class Qwen3OmniCode2WavForConditionalGeneration(OnePassModel):
    """Decodes one window a request, batched; implements ``OmniGenerator``.

    Payload: ``codes`` [T, groups] integers, ``context`` frames at its start that only give context, ``start`` frames of
    the waveform before the window. Output: ``audio`` float32 samples and ``sr``.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.vocoder = Vocoder(vllm_config.model_config.hf_config)

    def omni_generate(self, states: Sequence[OmniRequestState]) -> list[dict[str, Any]]:
        """New samples of each window."""
        windows = [self._window(state) for state in states]
        return [{"audio": wave, "sr": SAMPLE_RATE} for wave in self.vocoder.decode(windows)]

    def _window(self, state: OmniRequestState) -> CodeWindow:
        codes = state.tensor("codes", (None, self.vocoder.groups)).long()
        context, start = int(state.info.get("context", 0)), int(state.info.get("start", 0))
        if not 0 <= context < codes.shape[0]:
            raise RequestError(f"context={context}: the window has {codes.shape[0]} frames", field="context")
        if start and context <= self.vocoder.conv_context:
            raise RequestError(
                f"context={context}: a window inside a waveform needs more than {self.vocoder.conv_context} frames",
                field="codec_left_context_frames",
                value=context,
            )
        if bool(((codes < 0) | (codes >= self.vocoder.codebook_size)).any()):
            raise RequestError(f"codes must lie in 0..{self.vocoder.codebook_size - 1}", field="codes")
        return CodeWindow(codes, context, start)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the tensors below ``code2wav.``"""
        prefix = "code2wav."
        own = ((name.removeprefix(prefix), tensor) for name, tensor in weights if name.startswith(prefix))
        return {f"vocoder.{name}" for name in load_dense_weights(self.vocoder, own)}
