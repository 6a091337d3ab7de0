"""Whose tokens a model samples itself: the worker's side of ``OmniSampler``.

Requests get a slot of the model's ``TokenSampler`` when they are admitted or come back from a preemption, and give it
back when they finish or are preempted. A batch is sampled by the model if all of its requests ask only for what
``TokenSampler`` knows; otherwise vLLM samples the whole batch, and the model is told the tokens, so its record of them
never has gaps and batches may change sides at any step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vllm import SamplingParams, envs
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from vllm_omni.model_executor.layers.sampling import GREEDY_BELOW, Rules, TokenSampler

KNOWN = frozenset(
    {
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "min_tokens",
        "max_tokens",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "n",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "output_kind",
        "stream_interval",
        "skip_clone",
        "output_text_buffer_length",
        "skip_reading_prefix_cache",
        "repetition_detection",
        "extra_args",
        "_eos_token_id",
        "_all_stop_token_ids",
        "watermarking",  # of vLLM's V2 runner: stages refuse a watermark_config
        "_watermarking_skipped",
    }
)
"""Sampling parameters that ``TokenSampler`` honours, or that do not bear on the choice of a token. A request with
anything else than the default in any other parameter, also in one that a later vLLM adds, is sampled by vLLM."""

_DEFAULTS = SamplingParams()
_OTHERS = tuple(
    (name, getattr(_DEFAULTS, name)) for name in SamplingParams.__struct_fields__ if name not in KNOWN | {"seed"}
)


def is_known(params: SamplingParams) -> bool:
    """Whether ``TokenSampler`` samples as ``params`` ask."""
    if params.seed is not None and params.temperature >= GREEDY_BELOW:
        return False
    return all(
        (value is None) if default is None else value == default
        for value, default in ((getattr(params, name), default) for name, default in _OTHERS)
    )


class _Asked(NamedTuple):
    rules: Rules
    known: bool


class RequestSampler:
    """Keeps a model's ``TokenSampler`` in step with vLLM's batch."""

    def __init__(self, tokens: TokenSampler, vllm_sampler: Any) -> None:
        """``vllm_sampler`` is the ``Sampler`` that samples the other batches."""
        self._tokens = tokens
        self._able = tokens.able and not vllm_sampler.use_fp64_gumbel and not envs.VLLM_COMPUTE_NANS_IN_LOGITS
        self._free = list(range(tokens.rows))
        self._asked: dict[str, _Asked] = {}
        self._rows: list[_Asked] = []
        self._metadata: Any = None
        self._live: list[bool] | None = None

    @property
    def own(self) -> bool:
        """Whether the model samples the tokens of this step."""
        return self._tokens.own

    def update(self, scheduled: SchedulerOutput, batch: InputBatch, requests: Mapping[str, CachedRequestState]) -> None:
        """Follow what the scheduler said; ``batch`` and ``requests`` have followed already."""
        opened = [new.req_id for new in scheduled.scheduled_new_reqs]
        opened += scheduled.scheduled_cached_reqs.resumed_req_ids
        for req_id in (*scheduled.finished_req_ids, *(scheduled.preempted_req_ids or ()), *opened):
            asked = self._asked.pop(req_id, None)
            if asked is not None:
                self._free.append(asked.rules.slot)
        for req_id in opened:
            self._asked[req_id] = self._open(requests[req_id], batch)
        # vLLM makes new metadata whenever the batch changes.
        if opened or batch.sampling_metadata is not self._metadata:
            self._metadata, self._live = batch.sampling_metadata, None
            self._rows = [self._asked[req_id] for req_id in batch.req_ids]
            usual = all(type(processor) in BUILTIN_LOGITS_PROCESSORS for processor in batch.logitsprocs.all)
            self._tokens.own = self._able and usual and all(asked.known for asked in self._rows)

    def _open(self, request: CachedRequestState, batch: InputBatch) -> _Asked:
        params, slot = request.sampling_params, self._free.pop()
        assert params is not None
        row, made = batch.req_id_to_index[request.req_id], len(request.output_token_ids)
        tokens = batch.token_ids_cpu[row, : request.num_prompt_tokens + made]
        self._tokens.open(slot, tokens, made, params.min_tokens, params.all_stop_token_ids)
        top_k = params.top_k if 0 < params.top_k < self._tokens.vocabulary else self._tokens.vocabulary
        rules = Rules(slot, params.temperature, top_k, params.top_p, params.repetition_penalty)
        return _Asked(rules, is_known(params))

    def arrange(self, live: Sequence[bool]) -> None:
        """Before sampling: which rows of the batch get a token."""
        if live != self._live:
            self._live = list(live)
            self._tokens.arrange(
                [asked.rules if alive else None for asked, alive in zip(self._rows, live, strict=True)]
            )

    def restore(self, batch: InputBatch) -> None:
        """Before vLLM samples: the tokens of earlier steps that its penalties count.

        Under asynchronous scheduling vLLM notes a sampled token as -1 and puts in the real one before the next step's
        sampling, of the last step alone. After steps that the model sampled there are more; the model knows them.
        """
        if not self._able:
            return  # every step was vLLM's
        for row, tokens in enumerate(batch.sampling_metadata.output_token_ids):
            if len(tokens) > 1 and tokens[-2] < 0:
                tokens[:] = self._tokens.made(self._rows[row].rules.slot, len(tokens))
