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
from vllm_omni.model_executor.layers.sampling import TokenChoice, TokenSampler
from vllm_omni.model_executor.models.qwen3_omni.code_predictor import CodePredictor


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
        self._tokens, self._predictor, self._embed = tokens, predictor, embed
        self._residual = predictor.residuals, predictor.lm_head[0].out_features
        self._choice = TokenChoice(tokens, logits, size, dtype, draws=math.prod(self._residual))
        self._first_row = torch.zeros(rows, size, dtype=dtype)
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
        self._choice.prepare(hidden_BC, given_B)
        if not self._tokens.able:
            # Spread over several GPUs: embedding needs them all, which a graph of our own cannot hold.
            assert given_B is not None
            self._first_row[:batch].copy_(self._embed(given_B.long()))
        if self._tokens.drawing:
            for row, generator in generators.items():
                self._residual_noise(batch)[row].exponential_(generator=generator)
        codes, total = self._run(batch)
        return codes[:, :batch].clone(), total[:batch].clone()

    def _make(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [groups, batch] and sums [batch, C] of the first ``batch`` rows."""
        first = self._choice.choose(batch)
        row = self._embed(first) if self._tokens.able else self._first_row[:batch]
        greedy, noise = self._tokens.greedy(batch), self._residual_noise(batch)
        residual, total = self._predictor(self._choice.hidden[:batch], row, greedy, noise)
        return torch.cat([first[None], residual.T]).int(), total + row

    def _residual_noise(self, batch: int) -> torch.Tensor:
        """Draws [batch, residual codes, vocabulary]."""
        return self._choice.draws[:batch].unflatten(1, self._residual)

    def embed(self, codes_GB: torch.Tensor) -> torch.Tensor:
        """Sums of embeddings [B, C] of frames that were made before, as they were then."""
        codes_BG = codes_GB.T.long()
        return self._predictor.embed(codes_BG[:, 1:]) + self._embed(codes_BG[:, 0])
