"""``MultimodalOutputProcessor``: takes the payloads off a stage's outputs before vLLM detokenises them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput

from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.errors import OmniError, from_wire
from vllm_omni.worker.payload import unpack


@dataclass(frozen=True)
class TakenPayload:
    """One payload of one request."""

    request_id: str
    data: dict[str, Any]
    """Named tensors (large ones as ``LeafRef``) and values: ``hidden.<layer>`` with ``start``, the position of the
    first row, and what the model's hooks gave with ``step``."""
    error: OmniError | None = None
    """Set when the stage refused the request."""


def take_payloads(outputs: Sequence[EngineCoreOutput], codec: Codec) -> list[TakenPayload]:
    """Remove the payloads from ``outputs`` and return them in order; what lies in shared memory stays there.

    Without this vLLM would take a request that has one for a pooling request and skip its text.
    """
    taken: list[TakenPayload] = []
    for output in outputs:
        if output.pooling_output is None:
            continue
        data = unpack(output.pooling_output, codec, lazy=True)
        output.pooling_output = None
        error = data.pop("error", None)
        taken.append(TakenPayload(output.request_id, data, None if error is None else from_wire(error)))
    return taken


class MultimodalOutputProcessor(OutputProcessor):
    """vLLM's output processor for stages whose outputs carry payloads.

    ``payloads`` holds those of the last call, in the order of the outputs; they are not put on ``RequestOutput``, since
    vLLM may merge several of those into one.
    """

    def __init__(self, codec: Codec, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._codec = codec
        self.payloads: list[TakenPayload] = []

    def process_outputs(self, engine_core_outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any) -> Any:
        """Take the payloads, then detokenise as vLLM does."""
        self.payloads = take_payloads(engine_core_outputs, self._codec)
        result: OutputProcessorOutput = super().process_outputs(engine_core_outputs, *args, **kwargs)
        return result
