"""One audio frame of every request of a batch, from the talker's hidden state to all codes: one CUDA graph.

Logits of the first code, sampling, its embedding, the code predictor and the sum of embeddings that the next step
starts from are tensor operations on fixed places (``layers.sampling``, ``layers.graphed``), so the host copies hidden
states in, draws noise and launches one graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from vllm_omni.model_executor.layers.graphed import GraphedRows
from vllm_omni.model_executor.layers.sampling import TokenSampler
from vllm_omni.model_executor.models.qwen3_omni.code_predictor import CodePredictor

SAMPLE = -1
"""In place of a given first code: sample it."""


class FrameMaker:
    """Makes frames for up to ``tokens.rows`` requests."""

    def __init__(
        self,
        tokens: TokenSampler,
        predictor: CodePredictor,
        embed: Callable[[torch.Tensor], torch.Tensor],
        logits: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Tensors are made on torch's default device.

        Args:
            tokens: samples the first code; where it is not able to, that code is always given.
            predictor: finds the residual codes.
            embed: first codes [B] to embeddings [B, C].
            logits: hidden states [B, C] to logits [B, vocabulary] of the first code.
            dtype: of the embeddings.
        """
        rows, size = tokens.rows, predictor.spec.hidden_size
        self._tokens, self._predictor, self._embed, self._logits = tokens, predictor, embed, logits
        self._hidden = torch.zeros(rows, size, dtype=dtype)
        self._first = torch.full((rows,), SAMPLE, dtype=torch.int64)
        self._first_row = torch.zeros(rows, size, dtype=dtype)
        self._residual = predictor.residuals, predictor.lm_head[0].out_features
        # One draw for all codes of a frame.
        self._noise = torch.ones(rows, tokens.vocabulary + math.prod(self._residual), dtype=torch.float32)
        self._sampling = True
        self._run = GraphedRows(self._make)
        self.capture = self._run.capture

    def __call__(
        self, hidden_BC: torch.Tensor, given_B: torch.Tensor | None, generators: Mapping[int, torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One frame.

        Args:
            hidden_BC: final hidden states of the talker.
            given_B: the first codes; None: sample them as ``tokens`` was told to.
            generators: rows whose residual codes are drawn from a seed of their own.

        Returns:
            Codes [groups, B] int32, and the sums of their embeddings [B, C].
        """
        batch = len(hidden_BC)
        self._hidden[:batch].copy_(hidden_BC)
        if given_B is not None:
            self._first[:batch].copy_(given_B)
        elif not self._sampling:
            self._first.fill_(SAMPLE)
        self._sampling = given_B is None
        if not self._tokens.able:
            # Spread over several GPUs: embedding needs them all, which a graph of our own cannot hold.
            self._first_row[:batch].copy_(self._embed(self._first[:batch]))
        if self._tokens.drawing:
            self._noise[:batch].exponential_()
            for row, generator in generators.items():
                self._residual_noise(batch)[row].exponential_(generator=generator)
        codes, total = self._run(batch)
        return codes[:, :batch].clone(), total[:batch].clone()

    def _make(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [groups, batch] and sums [batch, C] of the first ``batch`` rows."""
        tokens, hidden, first = self._tokens, self._hidden[:batch], self._first[:batch]
        if tokens.able:
            drawn = tokens.sample(self._logits(hidden), self._noise[:batch, : tokens.vocabulary])
            first = torch.where(first == SAMPLE, drawn, first)
            tokens.keep(first)
            row = self._embed(first)
        else:
            row = self._first_row[:batch]
        residual, total = self._predictor(hidden, row, tokens.greedy(batch), self._residual_noise(batch))
        return torch.cat([first[None], residual.T]).int(), total + row

    def _residual_noise(self, batch: int) -> torch.Tensor:
        """Draws [batch, residual codes, vocabulary]."""
        return self._noise[:batch, self._tokens.vocabulary :].unflatten(1, self._residual)

    def embed(self, codes_GB: torch.Tensor) -> torch.Tensor:
        """Sums of embeddings [B, C] of frames that were made before, as they were then."""
        codes_BG = codes_GB.T.long()
        return self._predictor.embed(codes_BG[:, 1:]) + self._embed(codes_BG[:, 0])
