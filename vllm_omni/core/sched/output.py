"""What this package's schedulers add to vLLM's ``SchedulerOutput``, and read from its requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from vllm_omni.worker.payload import OmniPayload, payload_of

OmniNewRequestData = NewRequestData
"""vLLM's own: the payload rides in its sampling or pooling parameters, ``omni_payload`` reads it."""
omni_payload = payload_of

_ATTRIBUTE = "omni_chunks"


def attach_late_chunks(output: SchedulerOutput, chunks: Sequence[tuple[str, OmniPayload]]) -> None:
    """Send chunks of running requests to the workers with this step. ``SchedulerOutput`` has no slots, so it keeps the
    attribute over the way to worker processes."""
    setattr(output, _ATTRIBUTE, list(chunks))


def late_chunks(output: SchedulerOutput) -> Sequence[tuple[str, OmniPayload]]:
    """The chunks that ``attach_late_chunks`` put there."""
    found: Any = vars(output).get(_ATTRIBUTE, ())
    chunks: Sequence[tuple[str, OmniPayload]] = found
    return chunks
