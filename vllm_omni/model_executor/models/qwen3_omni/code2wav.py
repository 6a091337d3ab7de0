"""Stage ``code2wav``: windows of codes in, samples out. See ``vocoder`` for what a window has to bring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_omni.errors import RequestError
from vllm_omni.logger import init_logger
from vllm_omni.model_executor.layers.dense import load_dense_weights
from vllm_omni.model_executor.layers.graphed import batch_sizes
from vllm_omni.model_executor.layers.snake import fuse_snakes
from vllm_omni.model_executor.models.interfaces import OmniRequestState
from vllm_omni.model_executor.models.qwen3_omni.vocoder import CodeWindow, Vocoder
from vllm_omni.model_executor.models.utils import OnePassModel

logger = init_logger(__name__)

SAMPLE_RATE = 24000
FIRST_FRAMES = 4
STEADY_FRAMES = 25
"""New frames in the windows of a running stream, as the stage configurations have them."""
GRAPHED_BATCH = 8
"""More windows than this in one run are bound by arithmetic, not by launches."""


class Qwen3OmniCode2WavForConditionalGeneration(OnePassModel):
    """Decodes one window a request, batched; implements ``OmniGenerator`` and ``OmniWarmUp``.

    Payload: ``codes`` [T, groups] integers, ``context`` frames at its start that only give context, ``start`` frames of
    the waveform before the window. Output: ``audio`` float32 samples and ``sr``.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.vocoder = Vocoder(vllm_config.model_config.hf_config)

    def omni_generate(self, states: Sequence[OmniRequestState]) -> list[dict[str, Any]]:
        """New samples of each window."""
        windows = [self._window(state) for state in states]
        low, high = torch.stack(torch.cat([window.codes_TQ for window in windows]).aminmax()).tolist()
        if low < 0 or high >= self.vocoder.codebook_size:
            allowed = f"0 to {self.vocoder.codebook_size - 1}"
            raise RequestError(f"codes reach from {low} to {high}; allowed are {allowed}", field="codes")
        return [{"audio": wave, "sr": SAMPLE_RATE} for wave in self.vocoder.decode(windows)]

    def omni_warm_up(self, max_num_seqs: int) -> None:
        """Capture the windows of streams; decode first windows of 1 and of ``max_num_seqs`` requests, so that CUDA's
        libraries choose their kernels."""
        if self.vocoder.device.type != "cuda":
            return
        wrong = fuse_snakes(self.vocoder)
        if wrong is not None:
            logger.warning("code2wav runs its activations in PyTorch: %s", wrong)
        self.vocoder.capture([size for size in batch_sizes(max_num_seqs) if size <= GRAPHED_BATCH], STEADY_FRAMES)
        codes = torch.zeros(FIRST_FRAMES, self.vocoder.groups, dtype=torch.int64, device=self.vocoder.device)
        for count in {1, max_num_seqs}:
            self.vocoder.decode([CodeWindow(codes)] * count)

    def _window(self, state: OmniRequestState) -> CodeWindow:
        codes = state.tensor("codes", (None, self.vocoder.groups)).long()
        context, start = state.info.get("context", 0), state.info.get("start", 0)
        if not 0 <= context < codes.shape[0]:
            raise RequestError(f"context={context}: the window has {codes.shape[0]} frames", field="context")
        if start and context <= self.vocoder.conv_context:
            raise RequestError(
                f"context={context}: a window inside a waveform needs more than {self.vocoder.conv_context} frames",
                field="codec_left_context_frames",
                value=context,
            )
        return CodeWindow(codes, context, start)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the tensors below ``code2wav.``"""
        prefix = "code2wav."
        own = ((name.removeprefix(prefix), tensor) for name, tensor in weights if name.startswith(prefix))
        return {f"vocoder.{name}" for name in load_dense_weights(self.vocoder, own)}
