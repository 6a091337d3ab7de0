"""The next code of every request of a batch, from the talker's hidden state to its embedding: one CUDA graph.

Logits, sampling and the embedding that the next step starts from are tensor operations on fixed places
(``layers.sampling``, ``layers.graphed``), so the host copies hidden states in, draws noise and launches one graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_omni.model_executor.layers.graphed import GraphedRows
from vllm_omni.model_executor.layers.sampling import TokenChoice, TokenSampler


class CodeStep:
    """Chooses codes for up to ``tokens.rows`` requests."""

    def __init__(
        self,
        tokens: TokenSampler,
        embed: Callable[[torch.Tensor], torch.Tensor],
        logits: Callable[[torch.Tensor], torch.Tensor],
        width: int,
        dtype: torch.dtype,
    ) -> None:
        """Tensors are made on torch's default device.

        Args:
            tokens: samples; where it is not able to, codes are always given.
            embed: codes [B] to rows [B, width].
            logits: hidden states [B, width] to logits [B, vocabulary].
            width: of hidden states and rows.
            dtype: of both.
        """
        self._able, self._embed = tokens.able, embed
        self._choice = TokenChoice(tokens, logits, width, dtype)
        self._run = GraphedRows(self._make)
        self.capture = self._run.capture

    def __call__(self, hidden_BC: torch.Tensor, given_B: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [B] int32 and their rows [B, width].

        Args:
            hidden_BC: final hidden states of the talker.
            given_B: the codes; None: sample them as ``tokens`` was told to.
        """
        batch = len(hidden_BC)
        if not self._able:
            # Spread over several GPUs: embedding needs them all, which a graph of our own cannot hold.
            assert given_B is not None
            return given_B.int(), self._embed(given_B)
        self._choice.prepare(hidden_BC, given_B)
        codes, rows = self._run(batch)
        return codes[:batch].clone(), rows[:batch].clone()

    def _make(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = self._choice.choose(batch)
        return codes.int(), self._embed(codes)
