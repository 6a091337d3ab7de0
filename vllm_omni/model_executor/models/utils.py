"""What models of several families share."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from vllm.multimodal.audio import AudioResampler


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


def with_resampler(parser: Any) -> Any:
    """``parser``, vLLM's parser of media, with a resampler that is installed.

    vLLM resamples sounds with torchaudio, which its wheel for CPUs does not bring; PyAV, which reads media files, does
    it as well.
    """
    if importlib.util.find_spec("torchaudio") is None:
        parser.audio_resampler = AudioResampler(target_sr=parser.audio_resampler.target_sr, method="pyav")
    return parser
