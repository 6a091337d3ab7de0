"""What a function on an edge of the stage graph gets.

An edge function turns outputs of the source stages into the next chunk of input of the receiving stage. It is named in
the stage configuration (``custom_process_input_func: "module.function"``), is called by the driver (on a direct edge:
by the receiving stage's process), and has to be quick and free of side effects::

    @reads("speaker")
    def thinker2talker(edge: EdgeInput) -> dict | None:
        ids = [token for chunk in edge.outputs[0] for token in chunk["token_ids"]]
        return {"prompt_token_ids": ids} if ids or edge.last else None

An edge is an ordered stream of chunks; "not streaming" means that the function is called once, with everything. Large
tensors, arrays and images are ``LeafRef``s: they can be put into the result as they are, and travel from stage to stage
without passing through the driver. ``edge_ref.load()`` gives the value where a function must look at one.

``reads`` says which keys of the user's ``additional_information`` a function looks at. Where every edge and every stage
that gets the prompt says so, a request with another key is refused; a function without ``reads`` may look at any. It
may also say which sampling parameters the function reads of a stage that does not sample, where nobody else does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_omni.config.schema import nearest
from vllm_omni.errors import RequestError


class EdgeInput(msgspec.Struct, frozen=True):
    """Outputs of the sources that came since the last call for the same request."""

    request_id: str
    """Key of the request; unique while it is open."""
    outputs: Mapping[int, Sequence[Mapping[str, Any]]]
    """By source stage: its outputs in order. A merge is called when every source has enough, or has finished."""
    prompt: Any
    """The request's prompt, as the user gave it."""
    sampling_params: Any
    """Sampling parameters of the receiving stage."""
    chunk: int = 0
    """Number of the call for this request, from 0."""
    last: bool = True
    """Whether every source has finished: there will be no further call."""
    carry: dict[str, Any] = msgspec.field(default_factory=dict)
    """Memory of this edge for this request, from call to call; empty at first, dropped with the request."""
    extra: Mapping[str, Any] = msgspec.field(default_factory=dict)
    """Settings of the edge: ``extra`` of the connector that feeds the receiving stage (chunk sizes of a stream)."""
    config: Any = None
    """The checkpoint's configuration as transformers reads it, where the stages are parts of one checkpoint."""


EDGE_SETTINGS = frozenset(
    {
        "codec_chunk_frames",
        "initial_codec_chunk_frames",
        "codec_left_context_frames",
        "codec_right_context_frames",
        "initial_codec_right_context_frames",
    }
)
"""Keys of a connector's ``extra`` that are for edge functions (``EdgeInput.extra``) and not for the connector."""

EdgeFunction = Callable[[EdgeInput], Any]
"""Returns the prompt of the receiving stage's next chunk, or None to send nothing this time. None from the last call
of a request that had chunks before closes the stream; None from the only call means that the stage is not needed."""


@dataclass(frozen=True)
class ReadingEdge:
    """An edge function and what it reads of the user's ``additional_information``; made by ``reads``."""

    function: EdgeFunction
    """What is called."""
    keys: frozenset[str]
    """All keys that it reads."""
    params: frozenset[str] | None = None
    """All fields of the receiving stage's ``SamplingParams`` that it reads; None: any."""

    def __call__(self, edge: EdgeInput) -> Any:
        return self.function(edge)


def reads(*keys: str, params: Collection[str] | None = None) -> Callable[[EdgeFunction], ReadingEdge]:
    """Decorator of an edge function: ``keys`` are all that it reads of the user's ``additional_information``, and
    ``params`` of the receiving stage's sampling parameters, where that is a stage of vLLM's that does not sample."""
    return lambda function: ReadingEdge(function, frozenset(keys), None if params is None else frozenset(params))


def information(edge: EdgeInput) -> Mapping[str, Any]:
    """The user's ``additional_information``; empty where there is none."""
    return (edge.prompt.get("additional_information") or {}) if isinstance(edge.prompt, Mapping) else {}


def settings(edge: EdgeInput, *known: str) -> dict[str, Any]:
    """``extra_args`` of the receiving stage's sampling parameters, of which the edge reads ``known``.

    Raises:
        RequestError: another key.
    """
    given = dict(edge.sampling_params.extra_args or {}) if edge.sampling_params is not None else {}
    for key in given:
        if key not in known:
            hint = nearest(key, known) if known else "; it reads none"
            raise RequestError(f"extra_args of the stage's sampling parameters: unknown key {key!r}{hint}", field=key)
    return given


@reads(params=())
def pass_on(edge: EdgeInput) -> Any:
    """The edge where no function is named: the source's output is the prompt; several outputs in one call are a
    list."""
    (outputs,) = edge.outputs.values()
    return outputs[0] if len(outputs) == 1 else list(outputs) or None
