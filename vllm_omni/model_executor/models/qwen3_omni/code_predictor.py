"""The talker's code predictor: from the first code of an audio frame to all sixteen.

A small dense decoder runs once per remaining code, over at most 17 positions that live for one frame only: the talker's
hidden state, the first code, then each code found so far. Every code group has its own embedding and its own head.
Shapes are static for a batch size and nothing is read back to the host, so one frame is one CUDA graph. On a GPU the
layers are the kernels of ``layers.dense_kernels``, a quarter as many as plain PyTorch launches.
Source of the architecture: ``Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration`` of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm_omni.logger import init_logger
from vllm_omni.model_executor.layers.dense import DenseLayer, DenseSpec, RMSNorm, rope_table

logger = init_logger(__name__)

TOP_K = 50
TOP_P = 0.8
FUSED_BATCH = 64
"""Largest batch that runs on this package's kernels: the first pass has two rows a request."""


class _Decoder(nn.Module):
    """Layers, final norm and one embedding a code group, named as in the checkpoint."""

    def __init__(self, config: Any, spec: DenseSpec) -> None:
        super().__init__()
        groups = config.num_code_groups - 1
        self.codec_embedding = nn.ModuleList(nn.Embedding(config.vocab_size, spec.hidden_size) for _ in range(groups))
        self.layers = nn.ModuleList(DenseLayer(spec) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.eps)


class CodePredictor(nn.Module):
    """Predicts the residual codes of a batch of frames. Parameter names are those below ``talker.code_predictor.``"""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.spec = DenseSpec(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            eps=config.rms_norm_eps,
            rope_theta=config.rope_parameters["rope_theta"],
            qk_norm=True,
        )
        self.residuals = config.num_code_groups - 1
        self.fused = False
        """Whether it runs on ``layers.dense_kernels``."""
        self.model = _Decoder(config, self.spec)
        self.lm_head = nn.ModuleList(
            nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(self.residuals)
        )

    def use_kernels(self) -> None:
        """Run on ``layers.dense_kernels`` from now on, if they work on this machine."""
        from vllm_omni.model_executor.layers import dense_kernels

        weight = self.lm_head[0].weight
        wrong = dense_kernels.check(self.spec, weight.shape[0], weight.device, weight.dtype)
        self.fused = wrong is None
        if wrong is not None:
            logger.warning("the code predictor runs in PyTorch: %s", wrong)

    def noise(self, batch: int, generators: dict[int, torch.Generator], device: torch.device) -> torch.Tensor:
        """Exponential draws [B, residual codes, vocabulary] for ``forward``.

        ``generators`` gives rows (by index in the batch) that are drawn from a seed of their own.
        """
        out = torch.empty(batch, self.residuals, self.lm_head[0].out_features, device=device)
        if len(generators) < batch:
            out.exponential_()
        for row, generator in generators.items():
            out[row].exponential_(generator=generator)
        return out

    def embed(self, codes_BN: torch.Tensor) -> torch.Tensor:
        """Sum of the embeddings [B, C] of residual codes, rounded as ``forward`` does."""
        tables = [table.weight for table in self.model.codec_embedding]
        dtype = torch.float32 if self.fused else tables[0].dtype
        total = torch.zeros(len(codes_BN), self.spec.hidden_size, device=codes_BN.device, dtype=dtype)
        for table, codes_B in zip(tables, codes_BN.unbind(1), strict=True):
            total = total + table[codes_B]
        return total.to(tables[0].dtype)

    def forward(
        self, hidden_BC: torch.Tensor, first_BC: torch.Tensor, greedy_B: torch.Tensor, noise_BNV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual codes of one frame.

        Args:
            hidden_BC: final hidden state of the talker that the first code was sampled from.
            first_BC: embedding of the first code.
            greedy_B: bool, rows that take the likeliest code each time.
            noise_BNV: from ``noise``; unused in greedy rows.

        Returns:
            Codes [B, residual codes] int64 and the sum of their embeddings [B, C].
        """
        if self.fused and hidden_BC.shape[0] <= FUSED_BATCH:
            return self._fused(hidden_BC, first_BC, greedy_B, noise_BNV)
        batch, size = hidden_BC.shape
        length = self.residuals + 1
        rope = rope_table(length, self.spec, hidden_BC.device, hidden_BC.dtype)
        shape = (len(self.model.layers), 2, batch, self.spec.num_kv_heads, length, self.spec.head_dim)
        past = hidden_BC.new_empty(shape)
        x = torch.stack([hidden_BC, first_BC], dim=1)
        codes, total, start = [], torch.zeros_like(hidden_BC), 0
        for group in range(self.residuals):
            end = group + 2
            part = tuple(table[start:end] for table in rope)
            for number, layer in enumerate(self.model.layers):
                x = layer(x, part, past=past[number], start=start)
            logits = self.lm_head[group](self.model.norm(x[:, -1]))
            code = _sample(logits.float(), greedy_B, noise_BNV[:, group])
            embedded = self.model.codec_embedding[group](code)
            codes.append(code)
            total = total + embedded
            x, start = embedded.view(batch, 1, size), end
        return torch.stack(codes, dim=1), total

    def _fused(
        self, hidden_BC: torch.Tensor, first_BC: torch.Tensor, greedy_B: torch.Tensor, noise_BNV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``forward`` on kernels."""
        from vllm_omni.model_executor.layers import dense_kernels as kernels
        from vllm_omni.model_executor.layers.product_kernels import product

        (batch, size), device, length = hidden_BC.shape, hidden_BC.device, self.residuals + 1
        rope = rope_table(length, self.spec, device, torch.float32)
        shape = (len(self.model.layers), 2, batch, self.spec.num_kv_heads, length, self.spec.head_dim)
        past = hidden_BC.new_empty(shape)
        codes = torch.empty(batch, self.residuals, dtype=torch.int64, device=device)
        total = torch.zeros(batch, size, device=device)
        x, start, eps = torch.stack([hidden_BC, first_BC], dim=1).view(2 * batch, size), 0, self.spec.eps
        for group in range(self.residuals):
            new = x.shape[0] // batch
            for number, layer in enumerate(self.model.layers):
                x = kernels.run_layer(layer, x, rope, past[number], start, new)
            last = x.view(batch, new, size)[:, -1]
            logits = product(last, self.lm_head[group].weight, norm=self.model.norm.weight, eps=eps)
            table = self.model.codec_embedding[group].weight
            x = kernels.choose(logits, greedy_B, noise_BNV, group, table, codes, total, TOP_K, TOP_P)
            start += new
        return codes, total.to(hidden_BC.dtype)


def _sample(logits_BV: torch.Tensor, greedy_B: torch.Tensor, noise_BV: torch.Tensor) -> torch.Tensor:
    """One code a row: the likeliest one, or one drawn from the TOP_K likeliest within TOP_P.

    A draw is the largest of probability / exponential noise, which needs no host and no second random number.
    """
    top_BK, index_BK = logits_BV.topk(min(TOP_K, logits_BV.shape[-1]))
    probs = top_BK.softmax(-1)
    before = probs.cumsum(-1) - probs
    drawn = (probs / noise_BV.gather(-1, index_BK)).masked_fill(before >= TOP_P, -1.0).argmax(-1)
    chosen = index_BK.gather(-1, drawn[:, None])[:, 0]
    return torch.where(greedy_B, logits_BV.argmax(-1), chosen)
