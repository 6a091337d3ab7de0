"""What models of several families share."""

from __future__ import annotations

import torch
from torch import nn


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
