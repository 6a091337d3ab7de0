"""What models of several families share."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from vllm.multimodal.audio import AudioResampler
from vllm.multimodal.parse import AudioProcessorItems
from vllm.multimodal.processing import BaseProcessingInfo

from vllm_omni.errors import RequestError


class OnePassModel(nn.Module):
    """Base of the models of generation stages: has what vLLM looks for in a model, and takes no tokens.

    A subclass implements ``omni_generate`` (``OmniGenerator``) and ``load_weights``.
    """

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Never called: the stage's one placeholder token is not looked at."""
        raise RuntimeError("a generation stage embeds no tokens")

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Never called: the runner calls ``omni_generate``."""
        raise RuntimeError("a generation stage runs no tokens")

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Never called."""
        raise RuntimeError("a generation stage has no logits")


class CheckedSounds(BaseProcessingInfo):
    """Mixin of a model's processing info: sounds are resampled with what is installed, and long enough."""

    def get_data_parser(self) -> Any:
        """vLLM's parser. It resamples with torchaudio, which vLLM's wheel for CPUs does not bring; PyAV, which reads
        media files, does it as well."""
        parser = super().get_data_parser()
        if importlib.util.find_spec("torchaudio") is None:
            parser.audio_resampler = AudioResampler(target_sr=parser.audio_resampler.target_sr, method="pyav")
        return parser

    def parse_mm_data(self, mm_data: Any, *, validate: bool = True) -> Any:
        """vLLM's, of whichever way a request came.

        Raises:
            RequestError: a sound shorter than what the spectrogram mirrors at its ends, half a window.
        """
        items = super().parse_mm_data(mm_data, validate=validate)
        sounds = items.get("audio")
        if isinstance(sounds, AudioProcessorItems):
            extractor = self.get_feature_extractor()
            shortest, rate = extractor.n_fft // 2 + 1, extractor.sampling_rate
            for sound in sounds.get_all():
                if sound is not None and sound.shape[-1] < shortest:
                    raise RequestError(
                        f"audio: {sound.shape[-1]} samples at {rate} Hz; {shortest} are needed at least",
                        field="multi_modal_data",
                    )
        return items
