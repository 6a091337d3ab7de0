"""``GPUARModelRunner``: an autoregressive stage of a graph.

Five methods of vLLM's V1 runner are extended, none is copied::

    _update_states   opens, feeds and closes request states
    _prepare_inputs  is passed over where the last step's inputs need only move on (``worker/decode_inputs.py``)
    _preprocess      lets the model overwrite input embeddings with what an earlier stage sent
    _sample          lets the model sample, where it does so as the requests ask; keeps the tokens
    sample_tokens    calls the model's step hook and attaches hidden states and its outputs

Hidden states leave under ``hidden.<layer>`` with ``start``, the position of their first row: the whole prompt with the
first token, one row with each further one; models with mrope send the ``positions`` of the prompt as well. Step outputs
leave under the model's own names with ``step``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput, SamplerOutput
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput

from vllm_omni.errors import ConfigError, OmniError
from vllm_omni.model_executor.layers.graphed import batch_sizes
from vllm_omni.model_executor.models.interfaces import (
    OmniDecodeEmbedder,
    OmniEmbedder,
    OmniPositioner,
    OmniRequestState,
    OmniSampler,
    OmniStepper,
    StepOutputs,
)
from vllm_omni.worker.decode_inputs import DecodeInputs
from vllm_omni.worker.emission import Emission, HeldRows, OmniAsyncOutput, Row
from vllm_omni.worker.model_runner import OmniGPUModelRunner
from vllm_omni.worker.sampling import RequestSampler

FINAL = -1
EMBEDDINGS = 0
POSITIONS = "positions"
"""Name under which the rotary positions [n, 3] of the prompt's rows travel, for models with mrope."""


def layer_name(layer: int) -> str:
    """Name under which the hidden states of ``layer`` travel."""
    return f"hidden.{layer}"


class GPUARModelRunner(OmniGPUModelRunner):
    """Runs a model token by token, with payloads in and hidden states and step outputs out."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self._layers = self.omni_config.hidden_layers
        # vLLM's own way out for inner layers: with this flag the model returns (hidden, aux) also without a drafter.
        self._aux_layers = tuple(sorted(layer for layer in self._layers if layer not in (FINAL, EMBEDDINGS)))
        if self._aux_layers:
            self.use_aux_hidden_state_outputs = True
        self._embedder: OmniEmbedder | None = None
        self._decode_embedder: OmniDecodeEmbedder | None = None
        self._stepper: OmniStepper | None = None
        self._sampler: OmniSampler | None = None
        self._choosing: RequestSampler | None = None
        self._works = False
        self._positioner: OmniPositioner | None = None
        self._decode_inputs: DecodeInputs | None = None
        self._embeddings: torch.Tensor | None = None
        self._sampled: torch.Tensor | None = None
        self._step_rows: list[Row] = []
        self._step_hidden: torch.Tensor | None = None
        self._step_outputs: StepOutputs = ()
        self._held: dict[str, HeldRows] = {}

    def _find_hooks(self, model: torch.nn.Module) -> None:
        self._embedder = model if isinstance(model, OmniEmbedder) else None
        self._decode_embedder = model if isinstance(model, OmniDecodeEmbedder) else None
        if self._decode_embedder is not None and DecodeInputs.able(self):
            self._decode_inputs = DecodeInputs(self)
        self._stepper = model if isinstance(model, OmniStepper) else None
        self._sampler = model if isinstance(model, OmniSampler) else None
        if self._sampler is not None:
            self._choosing = RequestSampler(self._sampler.omni_sampler(), self.sampler)
        self._positioner = model if isinstance(model, OmniPositioner) else None
        # Without any of these nothing is sent, and nothing can fail: the stage is vLLM's own.
        hooks = self._embedder or self._stepper or self._sampler
        self._works = bool(self._layers or hooks or self.omni_config.takes_payload)
        if self._embedder is not None and not (self.enable_prompt_embeds or self.supports_mm_inputs):
            raise ConfigError("this model builds its input embeddings: set enable_prompt_embeds", field="model_arch")

    def _get_eagle3_aux_layers_from_config(self) -> tuple[int, ...] | None:
        return self._aux_layers or super()._get_eagle3_aux_layers_from_config()

    def _init_mrope_positions(self, req_state: CachedRequestState) -> None:
        if self._positioner is None:
            super()._init_mrope_positions(req_state)
            return
        state = self.omni_states[req_state.req_id]
        positions, delta = torch.arange(state.prompt_len).expand(3, -1), 0
        if state.error is None:
            try:
                positions, delta = self._positioner.omni_mrope_positions(state)
            except OmniError as error:
                state.error = error
        req_state.mrope_positions, req_state.mrope_position_delta = positions.cpu(), delta

    def _update_states(self, scheduler_output: SchedulerOutput) -> Callable[[], None] | None:
        for req_id in scheduler_output.finished_req_ids:
            self._held.pop(req_id, None)
        self._update_omni(scheduler_output)
        deferred: Callable[[], None] | None = super()._update_states(scheduler_output)
        if self._choosing is not None:
            self._choosing.update(scheduler_output, self.input_batch, self.requests)
        return deferred

    def omni_warm_up(self) -> None:
        """That of sampling, the model's own, and that of decode steps."""
        if self._sampler is not None and self._sampler.omni_sampler().able and self.device.type == "cuda":
            with torch.inference_mode():
                self._sampler.omni_sampler().use_kernels()
        super().omni_warm_up()
        if self._decode_inputs is not None and self.device.type == "cuda" and not self.model_config.enforce_eager:
            with torch.inference_mode():
                self._decode_inputs.capture(batch_sizes(self.max_num_reqs))

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        if self._decode_inputs is not None:
            self._decode_inputs.forget()
        return super()._dummy_run(*args, **kwargs)

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        decode = self._decode_inputs
        if decode is None:
            return super()._prepare_inputs(scheduler_output, *args, **kwargs)
        prepared = decode.follow(scheduler_output)
        if prepared is None:
            prepared = super()._prepare_inputs(scheduler_output, *args, **kwargs)
            decode.note(scheduler_output, prepared)
        return prepared

    def _preprocess(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        # Where nothing is embedded they can wait until the GPU has work.
        self._step_rows = self._rows() if self._embedder is not None else []
        decode = self._decode_rows()
        prepared = super()._preprocess(scheduler_output, *args, **kwargs)
        input_ids, inputs_embeds = prepared[0], prepared[1]
        if self._embedder is not None:
            self._write_embeddings(self._embedder, decode, inputs_embeds)
        if EMBEDDINGS in self._layers:
            count = scheduler_output.total_num_scheduled_tokens
            # A copy: the first fused norm of some backends writes the residual into its input.
            self._embeddings = (
                self.get_model().embed_input_ids(input_ids[:count])
                if inputs_embeds is None
                else inputs_embeds[:count].clone()
            )
        return prepared

    def _rows(self) -> list[Row]:
        """The batch of this step, in order."""
        count = self.input_batch.num_reqs
        ends = self.query_start_loc.np[: count + 1].tolist()
        positions = self.input_batch.num_computed_tokens_cpu[:count].tolist()
        partial = self.discard_request_mask.np[:count].tolist()
        states = [self.omni_states[req_id] for req_id in self.input_batch.req_ids]
        return list(map(Row, range(count), states, ends, ends[1:], positions, partial))

    def _decode_rows(self) -> list[Row]:
        """The rows whose embeddings the model makes as one batch. vLLM need not embed their tokens."""
        if self._decode_embedder is None:
            return []
        decode = [
            row
            for row in self._step_rows
            if row.end - row.begin == 1 and row.pos >= row.state.prompt_len and row.state.error is None
        ]
        if not self.supports_mm_inputs:
            self.is_token_ids.np[[row.begin for row in decode]] = False
        return decode

    def _write_embeddings(self, embedder: OmniEmbedder, decode: list[Row], inputs_embeds: torch.Tensor) -> None:
        batched = {row.place for row in decode}
        for row in self._step_rows:
            if row.place in batched or row.state.error is not None:
                continue
            try:
                embedder.omni_embed(row.state, row.pos, inputs_embeds[row.begin : row.end])
            except OmniError as error:
                row.state.error = error
        if decode and self._decode_embedder is not None:
            rows = self._decode_embedder.omni_embed_decode(
                [row.state for row in decode], [row.pos - row.state.prompt_len for row in decode]
            )
            begin = decode[0].begin
            if decode[-1].begin - begin == len(decode) - 1:
                inputs_embeds[begin : begin + len(decode)] = rows
            else:
                index = torch.tensor([row.begin for row in decode], device=inputs_embeds.device)
                inputs_embeds.index_copy_(0, index, rows.to(inputs_embeds.dtype))

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        model, choosing = self._sampler, self._choosing
        if model is None or choosing is None:
            output = super()._sample(*args, **kwargs)
            self._sampled = output.sampled_token_ids
            return output
        rows, hidden, output, given = self._step_rows, self._step_hidden, None, None
        assert hidden is not None
        states = [None if row.partial or row.state.error is not None else row.state for row in rows]
        choosing.arrange([state is not None for state in states])
        if not choosing.own:
            choosing.restore(self.input_batch)
            output = super()._sample(*args, **kwargs)
            given = output.sampled_token_ids[:, 0]
        tokens, self._step_outputs = model.omni_sample(states, [row.step_idx for row in rows], hidden, given)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=None) if output is None else output

    def _sample_all(self, grammar_output: Any) -> Any:
        """vLLM's sampling. A prompt that goes on in a later step has its sample thrown away: its generator must not
        move. vLLM winds it back, which only CUDA's generators can; others are taken away for the step."""
        generators, partial = self.input_batch.generators, self.discard_request_mask.np
        aside = [] if self.device.type == "cuda" else [index for index in generators if partial[index]]
        kept = {index: generators.pop(index) for index in aside}
        output = super().sample_tokens(grammar_output)
        generators.update(kept)
        return output

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        """vLLM's sampling, then the model's step hook; attaches ``pooler_output``."""
        step = self.execute_model_state
        if step is None:
            return super().sample_tokens(grammar_output)
        if not self._works:
            return self._sample_all(grammar_output)
        self._step_rows = rows = self._step_rows or self._rows()
        self._step_hidden = step.sample_hidden_states
        output = self._sample_all(grammar_output)
        chosen, layers = self._hidden_rows(rows, step)
        held = [self._held.setdefault(row.state.request_id, HeldRows()) for row in chosen]
        emission = Emission(self._sender(), len(rows), chosen, layers, held)
        sampling = [row for row in rows if not row.partial and row.state.error is None]
        if self._sampler is not None:
            emission.steps, emission.outputs, emission.whole = sampling, self._step_outputs, True
        elif self._stepper is not None and sampling:
            emission.steps = sampling
            emission.outputs = self._step(self._stepper, sampling, len(rows), step.sample_hidden_states)
        self._sampled = self._embeddings = self._step_hidden = None
        self._step_outputs, self._step_rows = (), []
        if not self.omni_sends:
            return output
        failed = [row for row in rows if row.state.error is not None and not row.partial]
        if not (emission.rows or emission.steps or failed):
            return output
        return self._attach(output, emission, failed)

    def _hidden_rows(self, rows: list[Row], step: Any) -> tuple[list[Row], dict[str, torch.Tensor]]:
        """The requests whose hidden states are sent, and those states one after another."""
        if not self._layers or not self.omni_sends:
            return [], {}
        chosen = [row for row in rows if row.state.request_id in self.omni_emit and row.state.error is None]
        if self.omni_config.hidden_rows == "media":
            chosen = [row for row in chosen if row.pos < row.state.prompt_len]
        if not chosen:
            return [], {}
        inner = dict(zip(self._aux_layers, step.aux_hidden_states or (), strict=False))
        sources = {FINAL: step.hidden_states, EMBEDDINGS: self._embeddings, **inner}
        layers: dict[str, torch.Tensor] = {}
        for layer in self._layers:
            states = sources[layer]
            assert states is not None
            if len(chosen) == len(rows):
                layers[layer_name(layer)] = states[: rows[-1].end]
            else:
                layers[layer_name(layer)] = torch.cat([states[row.begin : row.end] for row in chosen])
        if self.uses_mrope and any(row.pos < row.state.prompt_len for row in chosen):
            at_N3 = self.mrope_positions.gpu[:, : rows[-1].end].T
            layers[POSITIONS] = torch.cat([at_N3[row.begin : row.end] for row in chosen])
        return chosen, layers

    def _step(self, stepper: OmniStepper, rows: list[Row], batch: int, hidden: torch.Tensor) -> StepOutputs:
        assert self._sampled is not None
        sampled = self._sampled[:, 0].long()
        if len(rows) < batch:
            index = torch.tensor([row.place for row in rows], device=sampled.device)
            sampled, hidden = sampled[index], hidden[index]
        states: list[OmniRequestState] = [row.state for row in rows]
        return stepper.omni_step(states, [row.step_idx for row in rows], sampled, hidden)

    def _attach(self, output: Any, emission: Emission, failed: list[Row]) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        if isinstance(output, AsyncGPUModelRunnerOutput):
            emission.clone()
            return OmniAsyncOutput(output, emission, failed, self._get_or_create_async_output_copy_stream())
        if self.device.type != "cpu":
            emission.to_host()
            torch.cuda.current_stream().synchronize()
        output.pooler_output = emission.payloads()
        emission.fail(output.pooler_output, failed)
        return output
