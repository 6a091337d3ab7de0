"""What a model may implement to take part in a multi-stage request.

Every protocol is optional. The model runner looks each one up once, when the model is loaded::

    OmniEmbedder         prompt and per-step embeddings are built from what an earlier stage sent
    OmniDecodeEmbedder   the same for decode steps, as one batched call (saves launches on a GPU)
    OmniPositioner       rotary positions of the prompt (models with mrope)
    OmniStepper          work after sampling: code predictor, outputs to hand to the next stage
    OmniSampler          sampling and the work after it as one call, in place of vLLM's sampler and of OmniStepper
    OmniGenerator        a one-pass stage (vocoder): payloads in, outputs out, no tokens
    OmniWarmUp           called once before the first request: capture graphs, fill caches

The hooks run on every tensor-parallel rank with the same data, on the model's device, under ``inference_mode``,
outside CUDA graphs. A hook that finds its input wrong raises ``RequestError`` (``OmniRequestState.tensor`` does so):
that request alone fails. Every other exception ends the stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from vllm_omni.errors import OmniError, RequestError

if TYPE_CHECKING:
    from vllm_omni.model_executor.layers.sampling import TokenSampler

StepOutputs = Sequence[Mapping[str, Any]] | Mapping[str, torch.Tensor]
"""Outputs of a batch: one mapping a request (empty: nothing to send), or one mapping of tensors whose first dimension
is the batch. The second form costs one copy to the host for the whole batch; prefer it."""


@dataclass(eq=False)
class OmniRequestState:
    """One request of a stage, as the model's hooks see it. Lives from admission to finish, across preemptions."""

    request_id: str
    """The engine's id of the request."""
    prompt_len: int
    """Number of prompt tokens; decode step ``i`` has position ``prompt_len + i``."""
    info: dict[str, Any] = field(default_factory=dict)
    """The payload that came with the request: tensors on the model's device, and plain values."""
    chunks: list[dict[str, Any]] = field(default_factory=list)
    """Payloads that came later, in order."""
    last: bool = True
    """Whether no chunk follows. Steps beyond the streamed conditioning use the model's padding then."""
    model: dict[str, Any] = field(default_factory=dict)
    """Owned by the model: whatever it keeps for the request."""
    sampling_params: Any = None
    """vLLM's ``SamplingParams`` of the request; None in a generation stage."""
    error: OmniError | None = None
    """Set when the request's payload was refused; the hooks are not called for it any more."""

    def tensor(self, name: str, shape: Sequence[int | None] | None = None) -> torch.Tensor:
        """Tensor ``name`` of ``info``; ``shape`` is what it must have, ``None`` for a free dimension.

        Raises:
            RequestError: it is missing, no tensor, or of another shape.
        """
        return check_tensor(self.info, name, shape)


def check_tensor(payload: Mapping[str, Any], name: str, shape: Sequence[int | None] | None = None) -> torch.Tensor:
    """Tensor ``name`` of ``payload``, checked against ``shape`` (``None`` marks a free dimension).

    Raises:
        RequestError: it is missing, no tensor, or of another shape.
    """
    if name not in payload:
        raise RequestError(f"payload has no {name!r}; it has {', '.join(sorted(payload)) or 'nothing'}", field=name)
    value = payload[name]
    if not isinstance(value, torch.Tensor):
        raise RequestError(f"payload {name!r} is a {type(value).__name__}, expected a tensor", field=name)
    if shape is not None and (
        value.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True))
    ):
        raise RequestError(
            f"payload {name!r} has shape {tuple(value.shape)}, expected {tuple(shape)}",
            field=name,
            value=str(tuple(value.shape)),
            allowed=str(tuple(shape)),
        )
    return value


@runtime_checkable
class OmniEmbedder(Protocol):
    """Builds input embeddings from the payload."""

    def omni_embed(self, state: OmniRequestState, pos: int, rows: torch.Tensor) -> None:
        """Overwrite ``rows`` [n, H], the input embeddings of positions ``pos .. pos + n``, in place.

        ``rows`` holds the embeddings of the token ids when it is called. Positions below ``state.prompt_len`` are the
        prompt; position ``state.prompt_len + i`` is decode step ``i``, whose input is the token sampled as step ``i``.
        A call may cover a part of the prompt (chunked prefill) or prompt and earlier steps together (a preempted
        request is computed again), so keep per-step embeddings by index, not as "the last one".
        """


@runtime_checkable
class OmniDecodeEmbedder(OmniEmbedder, Protocol):
    """Builds the embeddings of a batch of single decode steps in one call."""

    def omni_embed_decode(self, states: Sequence[OmniRequestState], step_idx: Sequence[int]) -> torch.Tensor:
        """Input embeddings [B, H] of step ``step_idx[b]`` of ``states[b]`` (see ``omni_embed``).

        What the rows hold before is not defined. The error of one request goes into its ``error``, beside any row.
        """


@runtime_checkable
class OmniPositioner(Protocol):
    """Says where the prompt's tokens stand (models with multi-dimensional rotary positions)."""

    def omni_mrope_positions(self, state: OmniRequestState) -> tuple[torch.Tensor, int]:
        """Positions [3, prompt_len] int64 of the prompt, and what to add to the index of a later token (all three
        dimensions of decode step ``i`` stand at ``prompt_len + i + delta``). Replaces vLLM's
        ``get_mrope_input_positions``, which sees token ids and media but no payload."""


@runtime_checkable
class OmniStepper(Protocol):
    """Works on each sampled token."""

    def omni_step(
        self,
        states: Sequence[OmniRequestState],
        step_idx: Sequence[int],
        sampled: torch.Tensor,
        hidden: torch.Tensor,
    ) -> StepOutputs:
        """Called after sampling with the requests that got a token in this step.

        Args:
            states: B requests.
            step_idx: decode step of each sampled token; 0 is the token that the prompt's last position gave.
            sampled: [B] int64, on the device; reading it on the host costs a synchronisation.
            hidden: [B, H] final hidden state that the token was sampled from.

        Returns:
            What to send to the next stage with this token, in tensors that later steps do not write to. A recomputed
            step must give the same result: assign by ``step_idx``, never append.
        """


@runtime_checkable
class OmniSampler(Protocol):
    """Samples and does the work of a step in one call, which can be one CUDA graph.

    A batch whose requests ask for what ``TokenSampler`` knows is sampled here; vLLM samples every other.
    """

    def omni_sampler(self) -> TokenSampler:
        """What the runner tells of requests and rows. Where its ``own`` is set, ``compute_logits`` need not compute."""

    def omni_sample(
        self,
        states: Sequence[OmniRequestState | None],
        step_idx: Sequence[int],
        hidden: torch.Tensor,
        given: torch.Tensor | None,
    ) -> tuple[torch.Tensor, StepOutputs]:
        """Called in every step with the whole batch.

        Args:
            states: B requests, in the order of rows; None where the token is thrown away.
            step_idx: decode step of each sampled token, as in ``OmniStepper.omni_step``.
            hidden: [B, H] final hidden state to sample from.
            given: [B] the tokens that vLLM sampled; None: sample.

        Returns:
            Tokens [B, 1] int32 and what to send to the next stage, for all B, in tensors that later steps do not
            write to.
        """


@runtime_checkable
class OmniGenerator(Protocol):
    """A one-pass stage."""

    def omni_generate(self, states: Sequence[OmniRequestState]) -> StepOutputs:
        """Outputs of a batch of requests, from their ``info``. Keeps no state between calls."""


@runtime_checkable
class OmniWarmUp(Protocol):
    """Prepares before the first request."""

    def omni_warm_up(self, max_num_seqs: int) -> None:
        """Called once, with weights loaded and the KV cache in place: capture CUDA graphs for up to ``max_num_seqs``
        requests, fill tables."""
