"""One request as the driver sees it, and its deadline."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.config.schema import nearest
from vllm_omni.errors import DeadlineError, RequestError
from vllm_omni.inputs.data import OmniSamplingParams, OmniTextPrompt, OmniTokensPrompt


@dataclass(frozen=True)
class Deadline:
    """A point in time that is made once, where the request enters, and passed along."""

    at: float
    """``time.monotonic()`` second."""
    seconds: float
    """The time that was given."""

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline ``seconds`` from now."""
        return cls(time.monotonic() + seconds, seconds)

    def left(self) -> float:
        """Seconds left, 0 at least."""
        return max(0.0, self.at - time.monotonic())

    def error(self, phase: str, stage_id: int | None) -> DeadlineError:
        """The error that says where the time ran out."""
        return DeadlineError(
            f"{self.seconds:g} s are over while {phase}", phase=phase, stage_id=stage_id, seconds=self.seconds
        )


@dataclass(frozen=True)
class OmniRequest:
    """A checked request, ready for the stage graph."""

    request_id: str
    """The caller's id; need not be unique."""
    prompt: Any
    """As the caller gave it (``OmniPromptType``)."""
    sampling_params: Mapping[int, OmniSamplingParams]
    """By stage id."""
    output_modalities: Sequence[str] | None = None
    """Kinds of final output wanted; None means all that the graph makes."""
    deadline: Deadline | None = None
    arrived: float = field(default_factory=time.monotonic)
    """``time.monotonic()`` second at which it entered."""


_PROMPT_KEYS = frozenset({*OmniTextPrompt.__annotations__, *OmniTokensPrompt.__annotations__})


def check_prompt(prompt: Any) -> None:
    """Check the form of a prompt.

    Raises:
        RequestError: neither text nor a dictionary with known keys, or no prompt in it.
    """
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, Mapping):
        raise RequestError(
            f"a prompt is text or a dictionary, got {type(prompt).__name__}", field="prompt", value=repr(prompt)[:100]
        )
    for key in prompt:
        if key not in _PROMPT_KEYS:
            raise RequestError(f"prompt: unknown key {key!r}{nearest(str(key), _PROMPT_KEYS)}", field=str(key))
    if "prompt" not in prompt and "prompt_token_ids" not in prompt:
        raise RequestError('a prompt dictionary needs "prompt" or "prompt_token_ids"', field="prompt")
    if not isinstance(prompt.get("prompt", ""), str):
        raise RequestError(
            f"prompt must be text, got {type(prompt['prompt']).__name__}", field="prompt", value=repr(prompt)[:100]
        )
