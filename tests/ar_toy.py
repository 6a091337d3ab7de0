"""A toy talker and vocoder on vLLM's layers, and the same in plain torch.

The talker is a Qwen2 body whose prompt is made from an earlier stage's hidden states, which samples code 0 of each
frame and lets a small predictor make three more; the sum of the four code embeddings, plus one conditioning row a step,
is its next input. The vocoder turns frames into eight samples each and looks one frame back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2ForCausalLM
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from tests.ar_models import HIDDEN, save_lm
from vllm_omni.errors import RequestError
from vllm_omni.model_executor.models.interfaces import OmniRequestState, check_tensor
from vllm_omni.model_executor.models.registry import register_omni_model

GROUPS, CODES, FRAME = 4, 48, 8
register_omni_model("ToyTalker", "tests.ar_toy", "ToyTalker")
register_omni_model("ToyVocoder", "tests.ar_toy", "ToyVocoder")


class Predictor(nn.Module):
    """Codes 1 to 3 of a frame from code 0 and the hidden state, and the frame's embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(CODES, HIDDEN) for _ in range(GROUPS))
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, CODES, bias=False) for _ in range(GROUPS - 1))
        self.cond_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.pad = nn.Parameter(torch.zeros(HIDDEN))

    def frame(self, code0: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [B, 4] and embeddings [B, H] of a batch of frames."""
        codes, total = [code0 % CODES], self.embed[0](code0 % CODES)
        for group, head in enumerate(self.heads, start=1):
            codes.append(head(torch.tanh(hidden + total)).argmax(-1))
            total = total + self.embed[group](codes[-1])
        return torch.stack(codes, dim=1), total


class ToyTalker(nn.Module):
    """The talker on vLLM's layers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.model = Qwen2Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.predictor = Predictor()
        self.pads_seen = 0

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self, input_ids: Any, positions: Any, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Any:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)

    def omni_embed(self, state: OmniRequestState, pos: int, rows: torch.Tensor) -> None:
        prompt = state.tensor("prompt", (state.prompt_len, HIDDEN))
        end = pos + len(rows)
        count = max(0, min(end, state.prompt_len) - pos)
        rows[:count] = self.predictor.cond_proj(prompt[pos : pos + count])
        for position in range(pos + count, end):
            step = position - state.prompt_len
            rows[position - pos] = state.model["frames"][step] + self._conditioning(state, step)

    def _conditioning(self, state: OmniRequestState, step: int) -> torch.Tensor:
        for payload in (state.info, *state.chunks):
            if "cond" in payload:
                rows = check_tensor(payload, "cond", (None, HIDDEN))
                if step < len(rows):
                    return self.predictor.cond_proj(rows[step])
                step -= len(rows)
        assert state.last, "a step ran before its conditioning was there"
        self.pads_seen += 1
        return self.predictor.pad

    def omni_step(
        self, states: Sequence[OmniRequestState], step_idx: Sequence[int], sampled: torch.Tensor, hidden: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        codes, frames = self.predictor.frame(sampled, hidden)
        for state, step, frame in zip(states, step_idx, frames, strict=True):
            state.model.setdefault("frames", {})[step] = frame
        return {"codes": codes}


class BatchedToyTalker(ToyTalker):
    """The same with the batched decode hook."""

    calls = 0

    def omni_embed_decode(self, states: Sequence[OmniRequestState], step_idx: Sequence[int]) -> torch.Tensor:
        self.calls += 1
        return torch.stack(
            [s.model["frames"][step] + self._conditioning(s, step) for s, step in zip(states, step_idx, strict=True)]
        )


register_omni_model("BatchedToyTalker", "tests.ar_toy", "BatchedToyTalker")


class Wave(nn.Module):
    """Frames of codes to samples; a frame's samples depend on it and the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CODES, 16)
        self.conv = nn.Conv1d(16 * GROUPS, FRAME, 2)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """[B, T, 4] codes to [B, T * 8] samples."""
        features = self.embed(codes).flatten(2).transpose(1, 2)
        return torch.tanh(self.conv(nn.functional.pad(features, (1, 0)))).transpose(1, 2).flatten(1)


class ToyVocoder(nn.Module):
    """The vocoder as a generation stage. ``context`` frames at the start of a window are not given out."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.wave = Wave()
        self.batches: list[int] = []

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(
        self, input_ids: Any, positions: Any, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Any:
        raise NotImplementedError

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)

    def omni_generate(self, states: Sequence[OmniRequestState]) -> list[dict[str, Any]]:
        self.batches.append(len(states))
        outputs = []
        for state in states:
            codes = state.tensor("codes", (None, GROUPS))
            if int(codes.max()) >= CODES:
                raise RequestError(f"code {int(codes.max())} is out of range", field="codes")
            if state.info.get("too_big"):
                raise torch.OutOfMemoryError("tried to allocate too much")
            context = state.info.get("context", 0)
            outputs.append({"audio": self.wave(codes[None].long())[0, context * FRAME :], "sr": 8000})
        return outputs


def save_talker(folder: Path) -> tuple[Any, Predictor]:
    """Write a talker's checkpoint; returns its body and predictor in plain torch."""
    body = save_lm(folder, seed=7)
    torch.manual_seed(8)
    predictor = Predictor()
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.3)
    weights = load_file(folder / "model.safetensors")
    weights.update({f"predictor.{name}": value for name, value in predictor.state_dict().items()})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return body, predictor


def save_vocoder(folder: Path) -> Wave:
    """Write a vocoder's checkpoint; returns it in plain torch."""
    save_lm(folder)
    torch.manual_seed(9)
    wave = Wave()
    save_file({f"wave.{k}": v for k, v in wave.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    return wave.eval()


@torch.inference_mode()
def talk(
    body: Qwen2ForCausalLM, predictor: Predictor, prompt: torch.Tensor, cond: torch.Tensor, steps: int
) -> tuple[list[int], torch.Tensor]:
    """Code 0 as sampled greedily and all codes [steps, 4], in plain torch."""
    embeds, tokens, frames = predictor.cond_proj(prompt), [], []
    for step in range(steps):
        out = body.model(inputs_embeds=embeds[None])
        hidden = out.last_hidden_state[0, -1:]
        token = body.lm_head(hidden).argmax(-1)
        codes, frame = predictor.frame(token, hidden)
        tokens.append(int(token))
        frames.append(codes[0])
        row = predictor.cond_proj(cond[step]) if step < len(cond) else predictor.pad
        embeds = torch.cat([embeds, frame + row])
    return tokens, torch.stack(frames)
