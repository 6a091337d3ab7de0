"""Qwen3-Omni's talker: speaks what the thinker writes, one audio frame of 16 codes a step.

A mixture-of-experts decoder on vLLM's layers samples the first code of a frame; in the same step the code predictor
finds the other fifteen. The input of a step is the sum of the sixteen codes' embeddings and of one token of the
thinker's text, projected into the talker's width.

**Conditioning.** What transformers takes from the thinker as embedding rows is, at text positions, the thinker's token
embedding. The talker therefore keeps a copy of that table, and an earlier stage sends token ids; hidden states travel
only for the image, video and audio positions of the prompt. The payload of a request (``stage_input_processors/
qwen3_omni.py`` makes it)::

    text_ids    [L] int64     thinker tokens of the prompt
    codec_ids   [L] int64     codec tokens added to them, -1 for none
    text        [m] int64     thinker tokens that the first decode steps speak (optional)

and for a prompt with media, of P tokens in the thinker::

    rows        [U] int64     thinker position of each of the prompt's first U tokens
    media       [U] bool      which of those are conditioned on hidden states in place of the token
    hidden      [P, H] float  the thinker's hidden states
    positions   [P, 3] int64  the thinker's rotary positions

Later chunks hold ``text``. A step without text is conditioned on the padding token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.qwen3_moe import Qwen3MoeModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors
from vllm.transformers_utils.config import get_config

from vllm_omni.errors import RequestError
from vllm_omni.model_executor.layers.dense import load_dense_weights
from vllm_omni.model_executor.layers.graphed import GraphedBatch, batch_sizes
from vllm_omni.model_executor.models.interfaces import OmniRequestState, check_tensor
from vllm_omni.model_executor.models.qwen3_omni.code_predictor import CodePredictor

CONTROL_IDS = 1024
"""The last ids of the codec vocabulary are control ids; of them only the end of speech may be sampled."""


def talker_positions(thinker_P3: torch.Tensor, rows_U: torch.Tensor, length: int) -> torch.Tensor:
    """Rotary positions [3, length] of a talker prompt whose first U tokens come from the thinker's prompt.

    They come in runs, one for each of the user's turns. Inside a run positions lie as in the thinker; the first token
    of a run is text and stands one after everything before it, as do the tokens after the last run.
    """
    out = torch.empty(3, length, dtype=torch.int64)
    taken = thinker_P3.long()[rows_U].T
    starts = [0, *(torch.nonzero(rows_U.diff() != 1)[:, 0] + 1).tolist(), len(rows_U)]
    base = 0
    for begin, end in itertools.pairwise(starts):
        if begin < end:
            out[:, begin:end] = taken[:, begin:end] - taken[:, begin : begin + 1] + base
            base = int(out[:, begin:end].max()) + 1
    out[:, len(rows_U) :] = base + torch.arange(length - len(rows_U))
    return out


class ResizeMLP(nn.Module):
    """Brings the thinker's width to the talker's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        text = config.text_config
        self.linear_fc1 = nn.Linear(config.thinker_hidden_size, text.intermediate_size)
        self.linear_fc2 = nn.Linear(text.intermediate_size, text.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(nn.functional.silu(self.linear_fc1(x)))


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class _Decoder(Qwen3MoeModel):
    """vLLM's decoder, compiled for positions of shape [3, n]: its own decoration says [n]."""


class Qwen3OmniTalkerForConditionalGeneration(nn.Module, SupportsMRoPE):
    """Stage ``talker``: implements ``OmniDecodeEmbedder``, ``OmniPositioner``, ``OmniStepper`` and ``OmniWarmUp``."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "talker.model.codec_embedding.": "model.embed_tokens.",
            "talker.": "",
            "thinker.model.embed_tokens.": "thinker_embedding.",
            "thinker.": None,
            "code2wav.": None,
        }
    )
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        text = config.text_config
        # The release says "interleaved" where vLLM looks for "mrope_interleaved".
        text.rope_parameters["mrope_interleaved"] = True
        whole = get_config(vllm_config.model_config.model, vllm_config.model_config.trust_remote_code)
        self.config = config
        self.pad_id: int = whole.tts_pad_token_id
        self.model = _Decoder(
            vllm_config=vllm_config.with_hf_config(text, architectures=["Qwen3MoeForCausalLM"]),
            prefix=maybe_prefix(prefix, "model"),
        )
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.codec_head = ParallelLMHead(text.vocab_size, text.hidden_size, prefix=maybe_prefix(prefix, "codec_head"))
        self.logits_processor = LogitsProcessor(text.vocab_size)
        self.thinker_embedding = VocabParallelEmbedding(
            whole.thinker_config.text_config.vocab_size,
            config.thinker_hidden_size,
            prefix=maybe_prefix(prefix, "thinker_embedding"),
        )
        self.text_projection = ResizeMLP(config)
        self.hidden_projection = ResizeMLP(config)
        self.code_predictor = CodePredictor(config.code_predictor_config)
        self._predict = GraphedBatch(self.code_predictor)
        self._pad_row: torch.Tensor | None = None
        self._eager: bool = vllm_config.model_config.enforce_eager
        suppressed = torch.arange(text.vocab_size) >= text.vocab_size - CONTROL_IDS
        suppressed[config.codec_eos_token_id] = False
        self.register_buffer("suppressed", suppressed, persistent=False)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Codec embeddings [n, H]; the hooks below replace them for real requests."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        """Final hidden states [n, H]."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits [n, vocab] of the first code; control ids other than the end of speech cannot be sampled."""
        logits = self.logits_processor(self.codec_head, hidden_states)
        return None if logits is None else logits.masked_fill(self.suppressed, float("-inf"))

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """Plain positions, for requests without a payload (vLLM's warm-up)."""
        return torch.arange(len(input_tokens)).expand(3, -1), 0

    # -- hooks of model_executor.models.interfaces --

    def omni_mrope_positions(self, state: OmniRequestState) -> tuple[torch.Tensor, int]:
        """Those of the thinker for what is taken from its prompt, else 0 .. L-1."""
        if "positions" not in state.info:
            return self.get_mrope_input_positions([0] * state.prompt_len, [])
        rows = self._rows(state)
        positions = talker_positions(state.tensor("positions", (None, 3)).cpu(), rows.cpu(), state.prompt_len)
        return positions, int(positions.max()) + 1 - state.prompt_len

    def omni_embed(self, state: OmniRequestState, pos: int, rows: torch.Tensor) -> None:
        """Write prompt rows, and the rows of steps that are computed again."""
        if "prompt" not in state.model:
            state.model["prompt"] = self._prompt(state).to(rows.dtype)
        split = min(max(state.prompt_len - pos, 0), rows.shape[0])
        rows[:split] = state.model["prompt"][pos : pos + split]
        for row in range(split, rows.shape[0]):
            rows[row] = self._step_row(state, pos + row - state.prompt_len)

    def omni_embed_decode(self, states: Sequence[OmniRequestState], step_idx: Sequence[int]) -> torch.Tensor:
        """Inputs [B, H] of one step of each request: embeddings of its codes plus its text."""
        made = [state.model["codes"][step] for state, step in zip(states, step_idx, strict=True)]
        batch, _ = made[0]
        if [row for _, row in made] == list(range(len(batch))) and all(other is batch for other, _ in made):
            codes = batch  # the last step's batch goes on as it was
        else:
            codes = torch.stack([other[row] for other, row in made])
        rows = [self._text_row(state, step) for state, step in zip(states, step_idx, strict=True)]
        pad = self._pad()
        return codes + (pad if all(row is pad for row in rows) else torch.stack(rows))

    def omni_step(
        self,
        states: Sequence[OmniRequestState],
        step_idx: Sequence[int],
        sampled: torch.Tensor,
        hidden: torch.Tensor,
    ) -> Mapping[str, torch.Tensor]:
        """All codes of the frame, ``codes`` [B, groups] int32.

        The step that samples the end of speech gives a frame as well; its first code is the end id.
        """
        first = self.model.embed_input_ids(sampled)
        greedy, generators = self._sampling(states, sampled.device)
        noise = self.code_predictor.noise(len(states), generators, sampled.device)
        residual, total = self._predict(hidden.to(first.dtype), first, greedy, noise)
        total = total + first
        for row, (state, step) in enumerate(zip(states, step_idx, strict=True)):
            state.model.setdefault("codes", {})[step] = total, row
        return {"codes": torch.cat([sampled[:, None], residual], dim=1).int()}

    def omni_warm_up(self, max_num_seqs: int) -> None:
        """Capture the code predictor: sixteen tiny passes a frame are bound by launches otherwise."""
        device = self.suppressed.device
        if device.type != "cuda":
            return
        self.code_predictor.use_kernels()
        if self._eager:
            return
        row = self.model.embed_input_ids(torch.zeros(1, dtype=torch.int64, device=device))
        greedy = torch.ones(1, dtype=torch.bool, device=device)
        self._predict.capture(batch_sizes(max_num_seqs), (row, row, greedy, self.code_predictor.noise(1, {}, device)))

    def _sampling(
        self, states: Sequence[OmniRequestState], device: torch.device
    ) -> tuple[torch.Tensor, dict[int, torch.Generator]]:
        """Which rows take the likeliest code, as their sampling parameters say, and the generators of seeded rows."""
        generators: dict[int, torch.Generator] = {}
        greedy = []
        for row, state in enumerate(states):
            params = state.sampling_params
            greedy.append(params is not None and params.temperature == 0)
            if params is not None and params.seed is not None and not greedy[row]:
                if "generator" not in state.model:
                    state.model["generator"] = torch.Generator(device).manual_seed(params.seed)
                generators[row] = state.model["generator"]
        if all(greedy) or not any(greedy):
            return torch.full((len(greedy),), greedy[0], device=device), generators
        return torch.tensor(greedy).to(device, non_blocking=True), generators

    def _prompt(self, state: OmniRequestState) -> torch.Tensor:
        """Embeddings [L, H] of the prompt."""
        length = state.prompt_len
        codec = state.tensor("codec_ids", (length,))
        rows = self._project(state.tensor("text_ids", (length,)))
        if "media" in state.info:
            taken = self._rows(state)
            hidden = state.tensor("hidden", (None, self.config.thinker_hidden_size))[taken].to(rows.dtype)
            media = state.tensor("media", (len(taken),)).bool()[:, None]
            rows[: len(taken)] = torch.where(media, self.hidden_projection(hidden), rows[: len(taken)])
        coded = self.model.embed_input_ids(codec.clamp(min=0))
        return rows + coded * (codec >= 0)[:, None]

    def _rows(self, state: OmniRequestState) -> torch.Tensor:
        """Thinker positions [U] of the prompt's first tokens, checked."""
        rows = state.tensor("rows", (None,))
        thinker = min(state.tensor(name).shape[0] for name in ("hidden", "positions"))
        if len(rows) > state.prompt_len or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < thinker):
            raise RequestError(
                f"payload 'rows' ({len(rows)}) must lie in the thinker's {thinker} positions and in the prompt of "
                f"{state.prompt_len}",
                field="rows",
            )
        return rows

    def _project(self, ids: torch.Tensor) -> torch.Tensor:
        """Thinker tokens [n] as rows [n, H]."""
        return self.text_projection(self.thinker_embedding(ids))

    def _step_row(self, state: OmniRequestState, step: int) -> torch.Tensor:
        batch, row = state.model["codes"][step]
        summed: torch.Tensor = batch[row]
        return summed + self._text_row(state, step)

    def _text_row(self, state: OmniRequestState, step: int) -> torch.Tensor:
        """Text conditioning [H] of a step; chunks that have arrived since are projected first."""
        rows: list[torch.Tensor] = state.model.setdefault("text", [])
        read = state.model.get("read", 0)
        if read <= len(state.chunks):
            for payload in [state.info, *state.chunks[read:]] if read == 0 else state.chunks[read - 1 :]:
                if "text" in payload:
                    rows.extend(self._project(check_tensor(payload, "text", (None,))))
            state.model["read"] = len(state.chunks) + 1
        return rows[step] if step < len(rows) else self._pad()

    def _pad(self) -> torch.Tensor:
        """Conditioning [H] of a step without text; the same tensor every time."""
        if self._pad_row is None:
            self._pad_row = self._project(torch.tensor([self.pad_id], device=self.suppressed.device))[0]
        return self._pad_row

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the talker's tensors and the thinker's embedding table; the rest of the checkpoint is passed over."""
        predictor: list[tuple[str, torch.Tensor]] = []
        self._pad_row = None

        def others() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in self.hf_to_vllm_mapper.apply(weights):
                if name.startswith("code_predictor."):
                    predictor.append((name.removeprefix("code_predictor."), tensor))
                else:
                    yield name, tensor

        loaded = AutoWeightsLoader(self).load_weights(others())
        found = load_dense_weights(self.code_predictor, predictor)
        return loaded | {f"code_predictor.{name}" for name in found}
