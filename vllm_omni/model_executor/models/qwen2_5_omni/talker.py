"""Talker stage of Qwen2.5-Omni: what the thinker read and wrote -> codec tokens, 50 a second.

The input of every position is a sum in the thinker's width, projected to the talker's width:

====================================  ==========================================================================
position                              summands (``thinker`` = thinker's final hidden state + its embedding)
====================================  ==========================================================================
prompt token of the thinker           thinker, without the embedding where it is an image, a sound or a video
then                                  embedding of the voice's opening text token, codec pad
then                                  thinker of the reply's first token, codec start
decode step t                         code t, thinker of the reply's token 1 + t; after the reply's last token one
                                      text-end embedding, then text-pad embeddings
====================================  ==========================================================================

The projection is linear, so it is applied to the codec table, to the text markers and to the thinker's rows once each;
a decode step adds two rows of the talker's width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2_5OmniConfig
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.qwen2 import Qwen2MLP, Qwen2Model
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from vllm_omni.errors import RequestError
from vllm_omni.model_executor.layers.graphed import batch_sizes
from vllm_omni.model_executor.layers.sampling import TokenSampler
from vllm_omni.model_executor.models.interfaces import OmniRequestState, StepOutputs, check_tensor
from vllm_omni.model_executor.models.qwen2_5_omni.code_step import CodeStep
from vllm_omni.model_executor.models.qwen2_5_omni.voices import load_voices

_MEDIA = ("audio_token_index", "image_token_index", "video_token_index")
_CODEC_EMBED = "talker.model.embed_tokens.weight"
_TEXT_EMBED = "thinker.model.embed_tokens.weight"
_PROJ = "talker.thinker_to_talker_proj."


class TalkerLayer(nn.Module):
    """Qwen2's decoder layer with a head size of its own."""

    def __init__(
        self,
        config: Any,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(
            config,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.max_position_embeddings,
            quant_config,
            bias=True,
            cache_config=cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp = Qwen2MLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, quant_config, f"{prefix}.mlp"
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer on [tokens, hidden]; vLLM's norms add the residual."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class Qwen2_5OmniTalkerStage(nn.Module):
    """The autoregressive talker. Payload of a request (``thinker2talker`` makes it):

    - ``prompt_hidden``, ``prompt_embeds``: [L, E] final states and embeddings of the thinker's prompt.
    - ``prompt_token_ids``: the thinker's L prompt tokens.
    - ``positions``: [L, 3] rotary positions of the thinker's prompt.
    - ``reply_hidden``, ``reply_embeds``: lists of [k, E], the same of the first tokens of its reply, one at
      least; later chunks have more.
    - ``speaker``: name of the voice.

    The prompt is L + 2 tokens, codec mask, then codec pad and codec start: the repetition penalty looks at them.
    ``model.embed_tokens`` holds the projected codec table.
    """

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "talker.model.": "model.",
            "talker.codec_head.": "codec_head.",
            "thinker.": None,
            "token2wav.": None,
        }
    )
    suppressed: torch.Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model = vllm_config.model_config
        config = self.config = model.hf_config
        self.model = Qwen2Model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"), decoder_layer_type=TalkerLayer
        )
        self.codec_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "codec_head"),
        )
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.thinker_to_talker_proj = nn.Linear(config.embedding_size, config.hidden_size)
        self.voices = load_voices(model.model, model.revision, vllm_config.load_config.download_dir)
        self._markers = [
            *(voice.bos_token for voice in self.voices.values()),
            config.tts_text_end_token_id,
            config.tts_text_pad_token_id,
        ]
        self.marker_rows = nn.Parameter(torch.zeros(len(self._markers), config.hidden_size), requires_grad=False)
        """Projected embeddings of ``_markers``: each voice's opening token, text end, text pad."""
        whole = Qwen2_5OmniConfig.from_pretrained(model.model, revision=model.revision)
        self.register_buffer("suppressed", _suppressed(config, whole.token2wav_config), persistent=False)
        rows = vllm_config.scheduler_config.max_num_seqs
        # Several GPUs have a part of the codec head each: vLLM puts the logits together and samples.
        alone = get_tensor_model_parallel_world_size() == 1
        self._tokens = TokenSampler(rows, config.vocab_size, model.max_model_len, able=alone)
        self._code_step = CodeStep(
            self._tokens, self.embed_input_ids, self._logits, width=config.hidden_size, dtype=model.dtype
        )
        self._eager: bool = model.enforce_eager
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Projected codec embeddings, without the projection's bias."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """Final hidden states [tokens, hidden]; ``positions`` is [3, tokens]."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits [n, vocabulary]; None in steps whose codes ``omni_sample`` samples."""
        return None if self._tokens.own else self._logits(hidden_states)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits without the ids that are no code and no end."""
        logits: torch.Tensor = self.logits_processor(self.codec_head, hidden)
        return logits.masked_fill_(self.suppressed, float("-inf"))

    def omni_mrope_positions(self, state: OmniRequestState) -> tuple[torch.Tensor, int]:
        """The thinker's positions, and two text positions after them."""
        try:
            positions = state.tensor("positions", (state.prompt_len - 2, 3)).long().T
        except RequestError as error:
            # Called before the hooks that may refuse a request: let it run out on any positions.
            state.error = error
            return torch.arange(state.prompt_len).expand(3, -1), 0
        end = int(positions.max()) + 1
        positions = torch.cat([positions.cpu(), torch.tensor([end, end + 1]).expand(3, -1)], dim=1)
        return positions, end + 2 - state.prompt_len

    def omni_embed(self, state: OmniRequestState, pos: int, rows: torch.Tensor) -> None:
        """Prompt rows as laid out above; the thinker's part is added to the codes of decode steps."""
        if "prompt" not in state.model:
            state.model["prompt"], state.model["reply"] = self._prompt_rows(state)
        self._read_chunks([state])
        cut = max(0, min(state.prompt_len - pos, len(rows)))
        rows[:cut] = state.model["prompt"][pos : pos + cut].to(rows.dtype)
        if cut < len(rows):
            first = pos + cut - state.prompt_len
            rows[cut:] += torch.stack([self._reply_row(state, first + i) for i in range(len(rows) - cut)])

    def omni_embed_decode(self, states: Sequence[OmniRequestState], step_idx: Sequence[int]) -> torch.Tensor:
        """Rows [B, hidden] of single decode steps."""
        self._read_chunks(states)
        codes = self._code_rows(states, step_idx)
        if all(step > len(state.model["reply"]) for state, step in zip(states, step_idx, strict=True)):
            return codes + self.marker_rows[-1]
        rows = [self._reply_row(state, step) for state, step in zip(states, step_idx, strict=True)]
        return codes + (rows[0] if len(rows) == 1 else torch.stack(rows))

    def omni_sampler(self) -> TokenSampler:
        """Of the codes."""
        return self._tokens

    def omni_sample(
        self,
        states: Sequence[OmniRequestState | None],
        step_idx: Sequence[int],
        hidden: torch.Tensor,
        given: torch.Tensor | None,
    ) -> tuple[torch.Tensor, StepOutputs]:
        """The next codes, and what the next step starts from. Nothing is sent: the codes are the stage's tokens."""
        codes, rows = self._code_step(hidden, given)
        for row, (state, step) in enumerate(zip(states, step_idx, strict=True)):
            if state is not None:
                state.model.setdefault("codes", {})[step] = codes, row
                state.model["code_row"] = step, rows, row
        return codes[:, None], {}

    def omni_warm_up(self, max_num_seqs: int) -> None:
        """Capture the choice of a code: sampling is two dozen launches otherwise."""
        if self.suppressed.device.type == "cuda" and self._tokens.able and not self._eager:
            self._code_step.capture(batch_sizes(max_num_seqs))

    def _code_rows(self, states: Sequence[OmniRequestState], step_idx: Sequence[int]) -> torch.Tensor:
        """Rows [B, hidden] of the codes of these steps."""
        made = [self._code_row(state, step) for state, step in zip(states, step_idx, strict=True)]
        batch, _ = made[0]
        if [row for _, row in made] == list(range(len(batch))) and all(other is batch for other, _ in made):
            return batch  # the last step's batch goes on as it was
        return torch.stack([other[row] for other, row in made])

    def _code_row(self, state: OmniRequestState, step: int) -> tuple[torch.Tensor, int]:
        """A batch of code rows, and which of them is this step's."""
        last, batch, row = state.model["code_row"]
        if last != step:  # computed again
            codes, row = state.model["codes"][step]
            return self.embed_input_ids(codes[row : row + 1].long()), 0
        return batch, row

    def _project(self, hidden: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        weight = self.thinker_to_talker_proj.weight
        return self.thinker_to_talker_proj(hidden.to(weight.dtype) + embeds.to(weight.dtype))

    def _joined(self, payload: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """``reply_hidden`` and ``reply_embeds`` of a payload, [k, E] each."""
        out = []
        for name in ("reply_hidden", "reply_embeds"):
            parts = payload.get(name)
            if not isinstance(parts, list) or not parts:
                raise RequestError(f"payload {name!r} must be a list of tensors", field=name)
            shape = (None, self.config.embedding_size)
            out.append(torch.cat([check_tensor({name: part}, name, shape) for part in parts]))
        if len(out[0]) != len(out[1]):
            raise RequestError(f"{len(out[0])} rows of states, {len(out[1])} of embeddings", field="reply_embeds")
        return out[0], out[1]

    def _prompt_rows(self, state: OmniRequestState) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Rows of the prompt [L + 2, hidden], and of the reply's tokens after the first."""
        length, width = state.prompt_len - 2, self.config.embedding_size
        hidden = state.tensor("prompt_hidden", (length, width))
        embeds = state.tensor("prompt_embeds", (length, width))
        reply = self._project(*self._joined(state.info))
        tokens = state.info.get("prompt_token_ids")
        if not isinstance(tokens, list) or len(tokens) != length:
            raise RequestError(f"prompt_token_ids must be a list of {length} tokens", field="prompt_token_ids")
        media = {getattr(self.config, name) for name in _MEDIA}
        is_media = torch.tensor([token in media for token in tokens], device=hidden.device)
        voice = self.voices.pick(state.info.get("speaker"))
        opening = self.marker_rows[list(self.voices).index(voice.name)]
        pad, start = self.embed_input_ids(
            torch.tensor(
                [self.config.tts_codec_pad_token_id, self.config.tts_codec_start_token_id], device=hidden.device
            )
        )
        prompt = self._project(hidden, embeds.masked_fill(is_media[:, None], 0))
        for name in ("prompt_hidden", "prompt_embeds", "reply_hidden", "reply_embeds"):
            del state.info[name]
        return torch.cat([prompt, (opening + pad)[None], (reply[0] + start)[None]]), list(reply[1:].unbind())

    def _read_chunks(self, states: Sequence[OmniRequestState]) -> None:
        """Project the thinker's rows that have arrived, all requests' in one product."""
        owners: list[OmniRequestState] = []
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for state in states:
            chunks, state.chunks = state.chunks, []
            try:
                joined = [self._joined(chunk) for chunk in chunks]
            except RequestError as error:
                state.error = error
                continue
            parts += joined
            owners += [state] * len(joined)
        if not owners:
            return
        rows = self._project(torch.cat([hidden for hidden, _ in parts]), torch.cat([embeds for _, embeds in parts]))
        for state, own in zip(owners, rows.split([len(hidden) for hidden, _ in parts]), strict=True):
            state.model["reply"].extend(own.unbind())

    def _reply_row(self, state: OmniRequestState, step: int) -> torch.Tensor:
        reply = state.model["reply"]
        if step < len(reply):
            row: torch.Tensor = reply[step]
            return row
        return self.marker_rows[-2 if step == len(reply) else -1]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take the ``talker.`` tensors, and from the thinker's embeddings the rows of the text markers."""
        special: dict[str, torch.Tensor] = {}

        def rest() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name == _TEXT_EMBED:
                    special[name] = tensor[self._markers]
                elif name == _CODEC_EMBED or name.startswith(_PROJ):
                    special[name] = tensor
                else:
                    yield name, tensor

        loaded = AutoWeightsLoader(self).load_weights(rest(), mapper=self.hf_to_vllm_mapper)
        return loaded | self._load_projected(special)

    def _load_projected(self, special: dict[str, torch.Tensor]) -> set[str]:
        missing = {_CODEC_EMBED, _TEXT_EMBED, f"{_PROJ}weight", f"{_PROJ}bias"} - set(special)
        if missing:
            raise ValueError(f"the checkpoint has no {', '.join(sorted(missing))}")
        weight, bias = special[f"{_PROJ}weight"], special[f"{_PROJ}bias"]
        self.thinker_to_talker_proj.weight.data.copy_(weight)
        self.thinker_to_talker_proj.bias.data.copy_(bias)
        device = self.marker_rows.device
        weight, bias = weight.to(device).float(), bias.to(device).float()
        table = self.model.embed_tokens.weight
        projected = F.linear(special[_CODEC_EMBED].to(device).float(), weight)
        self.model.embed_tokens.weight_loader(table, projected.to(table.dtype))
        self.marker_rows.data.copy_(F.linear(special[_TEXT_EMBED].to(device).float(), weight, bias))
        return {
            "thinker_to_talker_proj.weight",
            "thinker_to_talker_proj.bias",
            "model.embed_tokens.weight",
            "marker_rows",
        }


def _suppressed(config: Any, token2wav: Any) -> torch.Tensor:
    """[vocab] bool: ids that token2wav has no embedding for, but for the two ends."""
    ids = torch.arange(config.vocab_size)
    out = ids > token2wav.dit_config.num_embeds
    out[[config.tts_codec_pad_token_id, config.tts_codec_end_token_id]] = False
    return out
