"""Outputs of one model step on their way from the device to the scheduler's ``pooler_output``.

Hidden states and step outputs are gathered on the device in as few tensors as possible, copied to the host at once (on
vLLM's output stream under async scheduling), and only then cut into one payload a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput

from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.model_executor.models.interfaces import OmniRequestState, StepOutputs
from vllm_omni.worker.payload import pack

OmniModelRunnerOutput = ModelRunnerOutput
"""vLLM's own: ``pooler_output`` holds one packed payload, or None, a request."""


@dataclass
class HeldRows:
    """Hidden states of the first part of a prompt, kept until its last part is computed."""

    start: int = 0
    """Position of the first held row."""
    parts: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """Host tensors by layer name, in order of position."""
    end: int = -1
    """Position after the last row that was seen, held or sent; -1 before the first."""


class Row(NamedTuple):
    """One request of a step."""

    place: int
    """Place in the batch."""
    state: OmniRequestState
    begin: int
    """First token row in the batch."""
    end: int
    """After its last token row."""
    pos: int
    """Position of the first token in its sequence."""
    partial: bool
    """Whether the prompt goes on in a later step: nothing is sampled."""

    @property
    def step_idx(self) -> int:
        """Decode step of the token that this row samples."""
        return self.pos + (self.end - self.begin) - self.state.prompt_len


class Sender(NamedTuple):
    """How payloads leave the worker."""

    codec: Codec
    holder: int
    """Process that reads them."""

    def pack(self, payload: Mapping[str, Any]) -> torch.Tensor:
        """``payload`` as ``pooler_output`` carries it."""
        return pack(payload, self.codec, self.holder)


@dataclass
class Emission:
    """Everything that one step sends."""

    sender: Sender
    batch_size: int
    rows: list[Row]
    """Requests whose hidden states are sent."""
    layers: dict[str, torch.Tensor]
    """Hidden states by name: the rows of ``rows`` one after another, [sum(n), H]."""
    held: list[HeldRows]
    """What is kept for each of ``rows``."""
    steps: list[Row] = field(default_factory=list)
    """Requests that sampled a token."""
    outputs: StepOutputs = ()
    """What the model's step hook gave for ``steps``."""
    whole: bool = False
    """Whether ``outputs`` are for the whole batch, by place."""

    def clone(self) -> None:
        """Detach hidden states from buffers that the next step overwrites. Step outputs stand by contract."""
        self.layers = _map(self.layers, torch.Tensor.clone)

    def to_host(self) -> None:
        """Start the copies to the host; on a GPU they are finished when the current stream gets there."""
        self.layers = _map(self.layers, _host)
        self.outputs = _map(self.outputs, _host)

    def payloads(self) -> list[torch.Tensor | None]:
        """``pooler_output``: one packed payload, or None, for each request of the batch. Needs finished copies."""
        found: dict[int, dict[str, Any]] = {}
        counts = [row.end - row.begin for row in self.rows]
        pieces = {name: value.split(counts) for name, value in self.layers.items()}
        for number, (row, held) in enumerate(zip(self.rows, self.held, strict=True)):
            rows = _hidden(row, held, {name: parts[number] for name, parts in pieces.items()})
            if rows:
                found[row.place] = rows
        outputs = self._step_outputs()
        for number, row in enumerate(self.steps):
            out = outputs[row.place if self.whole else number] if outputs else {}
            if out:
                found.setdefault(row.place, {}).update(out, step=row.step_idx)
        return [self.sender.pack(found[index]) if index in found else None for index in range(self.batch_size)]

    def fail(self, output: list[torch.Tensor | None], rows: Sequence[Row]) -> None:
        """Put the error of each failed request in place of its payload."""
        for row in rows:
            if row.state.error is not None and not row.partial:
                output[row.place] = self.sender.pack({"error": row.state.error.to_wire()})

    def _step_outputs(self) -> Sequence[Mapping[str, Any]]:
        """What each request sends, or nothing at all."""
        if not isinstance(self.outputs, Mapping):
            return self.outputs
        columns = [value.contiguous().unbind() for value in self.outputs.values()]
        return [dict(zip(self.outputs, row, strict=True)) for row in zip(*columns, strict=True)]


def _hidden(row: Row, held: HeldRows, layers: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The rows to send now: none while the prompt goes on, else with those held from its earlier parts.

    Rows that were sent or held before a preemption come a second time; they are dropped.
    """
    if held.end < 0:
        held.start = held.end = row.pos
    last = row.pos + row.end - row.begin
    known = held.end - row.pos
    if known < 0:
        raise RuntimeError(f"request {row.state.request_id}: rows {held.end} to {row.pos} were not computed")
    if last > held.end:
        part = {name: value[known:] for name, value in layers.items()} if known else layers
        # Views of the step's buffers must not outlive the step.
        held.parts.append({name: value.clone() for name, value in part.items()} if row.partial else part)
        held.end = last
    if row.partial or not held.parts:
        return {}
    parts, start = held.parts, held.start
    held.parts, held.start = [], held.end
    joined = parts[0] if len(parts) == 1 else {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
    return {"start": start, **joined}


class OmniAsyncOutput(AsyncModelRunnerOutput):
    """vLLM's asynchronous output plus an emission whose copies run on the same stream."""

    def __init__(
        self, inner: AsyncGPUModelRunnerOutput, emission: Emission, failed: list[Row], stream: torch.cuda.Stream
    ) -> None:
        self._inner = inner
        self._emission = emission
        self._failed = failed
        self._sources = (emission.layers, emission.outputs)  # kept until the copies are done
        main = torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            if emission.layers or not emission.whole:  # made after vLLM's output, which waited for what was before it
                stream.wait_stream(main)
            emission.to_host()
            inner.async_copy_ready_event.record()  # again: it says now that these copies are done as well

    def get_output(self) -> ModelRunnerOutput:
        """vLLM's output with ``pooler_output``; blocks until the copies are done."""
        output = self._inner.get_output()
        self._sources = ({}, ())
        output.pooler_output = self._emission.payloads()
        self._emission.fail(output.pooler_output, self._failed)
        return output


def _host(value: torch.Tensor) -> torch.Tensor:
    return value.to("cpu", non_blocking=True)


def _map(value: Any, function: Any) -> Any:
    """Apply ``function`` to every tensor of a structure."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map(item, function) for item in value]
    return value
