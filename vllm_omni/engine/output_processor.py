"""``MultimodalOutputProcessor``: takes the payloads off a stage's outputs before vLLM detokenises them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.outputs import RequestOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput
from vllm.v1.engine.parallel_sampling import ParentRequest

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

    A request for several answers (``n``) is as many requests in the engine; it has one output a step here.
    """

    def __init__(self, codec: Codec, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._codec = codec
        self.payloads: list[TakenPayload] = []
        self._asked_by: dict[str, str] = {}
        """Requests of the engine that are one answer of several -> the request."""

    def open(self, request: EngineCoreRequest, text: str | None) -> list[EngineCoreRequest]:
        """Expect the outputs of ``request``; returns what the engine has to be sent."""
        assert request.sampling_params is not None
        if request.sampling_params.n == 1:
            self.add_request(request, text)
            return [request]
        parent, children = ParentRequest(request), []
        for index in range(parent.n):
            child = copy.copy(request)
            child.request_id, child.sampling_params = parent.get_child_info(index)
            self.add_request(child, text, parent, index)
            self._asked_by[child.request_id] = request.request_id
            children.append(child)
        return children

    def process_outputs(self, engine_core_outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any) -> Any:
        """Take the payloads, then detokenise as vLLM does; outputs of several answers become one of their request."""
        self.payloads = take_payloads(engine_core_outputs, self._codec)
        result: OutputProcessorOutput = super().process_outputs(engine_core_outputs, *args, **kwargs)
        if self._asked_by:
            self._join(engine_core_outputs, result)
        return result

    def _join(self, outputs: list[EngineCoreOutput], result: OutputProcessorOutput) -> None:
        parents: dict[str, EngineCoreOutput] = {}
        others: list[EngineCoreOutput] = []
        for output in outputs:
            parent = self._asked_by.get(output.request_id)
            if parent is None:
                others.append(output)
            elif output.finish_reason is FinishReason.ERROR or parent not in parents:
                parents[parent] = copy.copy(output)
            if output.finished:
                self._asked_by.pop(output.request_id, None)
        rendered: dict[str, RequestOutput] = {}
        for made in result.request_outputs:
            assert isinstance(made, RequestOutput)
            if made.request_id in rendered:
                rendered[made.request_id].add(made, aggregate=True)
            else:
                rendered[made.request_id] = made
        result.request_outputs = list(rendered.values())
        for parent, output in parents.items():
            output.request_id, output.new_token_ids = parent, []
            if output.finish_reason is not FinishReason.ERROR and not (
                parent in rendered and rendered[parent].finished
            ):
                output.finish_reason = None
        outputs[:] = [*others, *parents.values()]

    def abort_requests(self, request_ids: Iterable[str], internal: bool) -> list[str]:
        """Forget requests; returns what the engine has to be told, answers of several included."""
        ids: list[str] = super().abort_requests(request_ids, internal)
        for request_id in ids:
            self._asked_by.pop(request_id, None)
        return ids
