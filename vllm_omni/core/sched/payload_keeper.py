"""No payload is lost between driver and worker: what will not be read is given up, so that its memory is free again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_omni.distributed.omni_connectors.utils.arena import Arena
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.worker.payload import discard, payload_of


class PayloadKeeper:
    """Mixin for schedulers: gives up the payloads of requests that end before a worker saw them, and the outputs of
    requests that ended while a step was under way."""

    requests: dict[str, Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._codec = Codec(Arena())
        self._unseen: set[str] = set()

    def give_up(self, blocks: Iterable[bytes | torch.Tensor]) -> None:
        """Release what nobody will read."""
        discard(blocks, self._codec)

    def add_request(self, request: Request) -> None:
        """Queue a request and note that its payload is unread."""
        super().add_request(request)  # type: ignore[misc]
        if payload_of(request).data:
            self._unseen.add(request.request_id)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's step; the payloads of new requests go to the workers with it."""
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if self._unseen:
            self._unseen.difference_update(new.req_id for new in output.scheduled_new_reqs)
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """vLLM's bookkeeping; outputs that it would drop are given up."""
        payloads = model_runner_output.pooler_output
        if payloads is not None:
            for req_id, index in model_runner_output.req_id_to_index.items():
                request = self.requests.get(req_id)
                if payloads[index] is not None and (request is None or request.is_finished()):
                    self.give_up([payloads[index]])
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if request.request_id in self._unseen:
            self._unseen.discard(request.request_id)
            self.give_up(payload_of(request).data)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
