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
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.qwen3_moe import Qwen3MoeModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors
from vllm.transformers_utils.config import get_config

from vllm_omni.errors import OmniError, RequestError
from vllm_omni.model_executor.layers.dense import load_dense_weights
from vllm_omni.model_executor.layers.graphed import batch_sizes
from vllm_omni.model_executor.layers.sampling import TokenSampler
from vllm_omni.model_executor.models.interfaces import OmniRequestState, check_tensor
from vllm_omni.model_executor.models.qwen3_omni.code_predictor import CodePredictor
from vllm_omni.model_executor.models.qwen3_omni.frame import FrameMaker

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


def _codes(state: OmniRequestState, step: int) -> torch.Tensor:
    """Codes [groups] of a frame that was made before."""
    codes_GB, row = state.model["codes"][step]
    codes: torch.Tensor = codes_GB[:, row]
    return codes


def _generators(states: Sequence[OmniRequestState | None], device: torch.device) -> dict[int, torch.Generator]:
    """Those of the rows whose request has a seed."""
    generators: dict[int, torch.Generator] = {}
    for row, state in enumerate(states):
        if state is not None and state.sampling_params.seed is not None:
            if "generator" not in state.model:
                state.model["generator"] = torch.Generator(device).manual_seed(state.sampling_params.seed)
            generators[row] = state.model["generator"]
    return generators


class Qwen3OmniTalkerForConditionalGeneration(nn.Module, SupportsMRoPE):
    """Stage ``talker``: implements ``OmniDecodeEmbedder``, ``OmniPositioner``, ``OmniSampler`` and ``OmniWarmUp``."""

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
        model_config = vllm_config.model_config
        # Several GPUs have a part of the codec head each: vLLM puts the logits together and samples.
        alone = get_tensor_model_parallel_world_size() == 1
        rows = vllm_config.scheduler_config.max_num_seqs
        self._tokens = TokenSampler(rows, text.vocab_size, model_config.max_model_len, able=alone)
        self._frames = FrameMaker(
            self._tokens, self.code_predictor, self.embed_input_ids, self._logits, dtype=model_config.dtype
        )
        self._pad_row: torch.Tensor | None = None
        self._eager: bool = model_config.enforce_eager
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
        """Logits [n, vocab] of the first code; None in steps whose tokens ``omni_sample`` samples."""
        return None if self._tokens.own else self._logits(hidden_states)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Control ids other than the end of speech cannot be sampled."""
        logits: torch.Tensor = self.logits_processor(self.codec_head, hidden)
        return logits.masked_fill(self.suppressed, float("-inf"))

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
        if split < rows.shape[0]:
            self._read_text([state])
            first = pos + split - state.prompt_len
            steps = range(first, first + rows.shape[0] - split)
            codes = self._frames.embed(torch.stack([_codes(state, step) for step in steps], dim=1))
            rows[split:] = codes + torch.stack([self._text_row(state, step) for step in steps])

    def omni_embed_decode(self, states: Sequence[OmniRequestState], step_idx: Sequence[int]) -> torch.Tensor:
        """Inputs [B, H] of one step of each request: embeddings of its codes plus its text."""
        self._read_text(states)
        made = [self._sum(state, step) for state, step in zip(states, step_idx, strict=True)]
        batch, _ = made[0]
        if [row for _, row in made] == list(range(len(batch))) and all(other is batch for other, _ in made):
            codes = batch  # the last step's batch goes on as it was
        else:
            codes = torch.stack([other[row] for other, row in made])
        rows = [self._text_row(state, step) for state, step in zip(states, step_idx, strict=True)]
        alike = all(row is rows[0] for row in rows)  # one request, or all beyond their text
        return codes + (rows[0] if alike else torch.stack(rows))

    def omni_sampler(self) -> TokenSampler:
        """Of the first code."""
        return self._tokens

    def omni_sample(
        self,
        states: Sequence[OmniRequestState | None],
        step_idx: Sequence[int],
        hidden: torch.Tensor,
        given: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """All codes of the frame, ``codes`` [B, groups] int32.

        The step that samples the end of speech gives a frame as well; its first code is the end id.
        """
        codes_GB, total = self._frames(hidden, given, _generators(states, hidden.device))
        for row, (state, step) in enumerate(zip(states, step_idx, strict=True)):
            if state is not None:
                state.model.setdefault("codes", {})[step] = codes_GB, row
                state.model["sum"] = step, total, row
        return codes_GB[0][:, None], {"codes": codes_GB.T}

    def omni_warm_up(self, max_num_seqs: int) -> None:
        """Capture the frame: seventeen tiny passes are bound by launches otherwise."""
        if self.suppressed.device.type != "cuda":
            return
        self.code_predictor.use_kernels()
        if not self._eager:
            self._frames.capture(batch_sizes(max_num_seqs))

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

    def _read_text(self, states: Sequence[OmniRequestState]) -> None:
        """Project the text that has arrived for any of ``states``, in one go."""
        found: list[tuple[OmniRequestState, torch.Tensor]] = []
        for state in states:
            read = state.model.get("read", 0)
            if read > len(state.chunks):
                continue
            state.model["read"] = len(state.chunks) + 1
            for payload in [state.info, *state.chunks][read:]:
                if "text" in payload and state.error is None:
                    try:
                        found.append((state, check_tensor(payload, "text", (None,))))
                    except OmniError as error:
                        state.error = error
        if not found:
            return
        rows = self._project(torch.cat([ids for _, ids in found]))
        for (state, _), part in zip(found, rows.split([len(ids) for _, ids in found]), strict=True):
            state.model.setdefault("text", []).extend(part.unbind())

    def _sum(self, state: OmniRequestState, step: int) -> tuple[torch.Tensor, int]:
        """A batch of summed embeddings [B, H], and the row in it that is this frame's."""
        last, batch, row = state.model["sum"]
        return (batch, row) if last == step else (self._frames.embed(_codes(state, step)[:, None]), 0)

    def _text_row(self, state: OmniRequestState, step: int) -> torch.Tensor:
        """Text conditioning [H] of a step."""
        rows: Sequence[torch.Tensor] = state.model.get("text", ())
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
