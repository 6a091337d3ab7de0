"""Inputs of a step in which every request of the last one decodes its next token.

vLLM prepares each step from what stands on the host: about nine copies to the device and a dozen small kernels, 0.8 to
1.0 ms of the host's time. From one decode step to the next, positions, lengths and slots move on by one and all else
stays; so the tensors of the last step are moved on where they are, by one CUDA graph. vLLM prepares every other step:
when a request comes, goes, is preempted, waits for a step, or computes a part of its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.block_table import SlotMappingMode

from vllm_omni.model_executor.layers.graphed import GraphedRows, Tensors


class DecodeInputs:
    """Moves the inputs of vLLM's V1 runner on by one token a request.

    For models that make the embeddings of decode steps themselves: token ids are not brought up to date.
    """

    def __init__(self, runner: Any) -> None:
        """``runner`` is vLLM's; ``able`` says whether it can be helped."""
        self._runner = runner
        self._requests: list[str] = []
        self._next = np.zeros(0, dtype=np.int64)
        self._prepared: Any = None
        self._run = GraphedRows(self._move)

    @staticmethod
    def able(runner: Any) -> bool:
        """Whether nothing else of ``runner`` changes from one decode step to the next."""
        parallel = runner.parallel_config
        return (
            runner.enable_prompt_embeds
            and not runner.supports_mm_inputs
            and runner.speculative_config is None
            and runner.lora_config is None
            and parallel.decode_context_parallel_size == 1
            and parallel.prefill_context_parallel_size == 1
        )

    def capture(self, sizes: Sequence[int]) -> None:
        """Capture graphs for batches of ``sizes``. Only between requests: it forgets what was prepared."""
        self.forget()
        self._runner.seq_lens.zero_()
        self._run.capture(sizes)

    def forget(self) -> None:
        """Something else used the runner's tensors."""
        self._prepared = None

    def note(self, scheduled: SchedulerOutput, prepared: Any) -> None:
        """vLLM prepared this step, and its method gave ``prepared``."""
        batch = self._runner.input_batch
        count = batch.num_reqs
        computed = batch.num_computed_tokens_cpu[:count]
        decodes = scheduled.total_num_scheduled_tokens == count and (computed >= batch.num_prompt_tokens[:count]).all()
        usual = all(
            table.slot_mapping_mode == SlotMappingMode.TOKEN_TO_KV_SLOT for table in batch.block_table.block_tables
        )
        if not (decodes and usual) or self._runner.discard_request_mask.np[:count].any():
            self._prepared = None
            return
        self._requests, self._next, self._prepared = list(batch.req_ids), computed + 1, prepared

    def follow(self, scheduled: SchedulerOutput) -> Any:
        """Prepare this step and give what vLLM's method would; None if it does not just follow the last one."""
        batch, cached = self._runner.input_batch, scheduled.scheduled_cached_reqs
        count = batch.num_reqs
        if (
            self._prepared is None
            or scheduled.total_num_scheduled_tokens != count
            or scheduled.scheduled_new_reqs
            or cached.resumed_req_ids
            or batch.req_ids != self._requests
            or not (batch.num_computed_tokens_cpu[:count] == self._next).all()
        ):
            return None
        if any(blocks is not None for blocks in cached.new_block_ids):
            batch.block_table.commit_block_table(count)
        self._next += 1
        self._runner.optimistic_seq_lens_cpu[:count].add_(1)
        self._run(count)
        return self._prepared

    def _move(self, rows: int) -> Tensors:
        """On the device, the first ``rows`` rows; those beyond the batch have length 0 and stay as they are."""
        runner = self._runner
        lengths, positions = runner.seq_lens[:rows], runner.positions[:rows]
        dead = lengths == 0
        live = ~dead
        lengths += live
        positions += live
        if runner.uses_mrope:
            runner.mrope_positions.gpu[:, :rows].add_(live)
        for table in runner.input_batch.block_table.block_tables:
            blocks_RB, size = table.block_table.gpu[:rows], table.block_size
            # A row beyond the batch may have any position.
            place = (positions // size).clamp(max=blocks_RB.shape[1] - 1)
            slots = (positions % size).add(blocks_RB.gather(1, place[:, None])[:, 0], alpha=size)
            table.slot_mapping.gpu[:rows].copy_(slots.masked_fill_(dead, -1))
        return ()
