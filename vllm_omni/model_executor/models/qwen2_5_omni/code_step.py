"""The next code of every request of a batch, from the talker's hidden state to its embedding: one CUDA graph.

Logits, sampling and the embedding that the next step starts from are tensor operations on fixed places
(``layers.sampling``, ``layers.graphed``), so the host copies hidden states in, draws noise and launches one graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_omni.model_executor.layers.graphed import GraphedRows
from vllm_omni.model_executor.layers.sampling import TokenSampler

_SAMPLE = -1
"""In place of a given code: sample it."""


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
        self._tokens, self._embed, self._logits = tokens, embed, logits
        self._hidden = torch.zeros(tokens.rows, width, dtype=dtype)
        self._noise = torch.ones(tokens.rows, tokens.vocabulary, dtype=torch.float32)
        self._given = torch.full((tokens.rows,), _SAMPLE, dtype=torch.int64)
        self._sampling = True
        self._run = GraphedRows(self._make)
        self.capture = self._run.capture

    def __call__(self, hidden_BC: torch.Tensor, given_B: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [B] int32 and their rows [B, width].

        Args:
            hidden_BC: final hidden states of the talker.
            given_B: the codes; None: sample them as ``tokens`` was told to.
        """
        batch = len(hidden_BC)
        if not self._tokens.able:
            # Spread over several GPUs: embedding needs them all, which a graph of our own cannot hold.
            assert given_B is not None
            return given_B.int(), self._embed(given_B)
        if given_B is not None:
            self._given[:batch].copy_(given_B)
        else:
            self._hidden[:batch].copy_(hidden_BC)
            if not self._sampling:
                self._given.fill_(_SAMPLE)
            if self._tokens.drawing:
                self._noise[:batch].exponential_()
        self._sampling = given_B is None
        codes, rows = self._run(batch)
        return codes[:batch].clone(), rows[:batch].clone()

    def _make(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        given = self._given[:batch]
        drawn = self._tokens.sample(self._logits(self._hidden[:batch]), self._noise[:batch])
        codes = torch.where(given == _SAMPLE, drawn, given)
        self._tokens.keep(codes)
        return codes.int(), self._embed(codes)
