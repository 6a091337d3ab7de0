"""``OmniGenerationScheduler``: scheduler of a generation stage."""

from __future__ import annotations

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_omni.core.sched.payload_keeper import PayloadKeeper
from vllm_omni.errors import RequestError


class OmniGenerationScheduler(PayloadKeeper, Scheduler):
    """Runs every request in one step: a request is one placeholder token, and its first output finishes it.

    vLLM's scheduler does that as it is; the batch is bounded by ``max_num_seqs``. Only what would never end is refused.
    """

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it has sampling parameters; nothing would finish it.
        """
        if request.pooling_params is None:
            raise RequestError("a generation stage takes pooling parameters", field="sampling_params")
        super().add_request(request)
