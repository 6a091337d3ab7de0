"""One request as the driver sees it, and its deadline."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.config.schema import nearest
from vllm_omni.errors import DeadlineError, RequestError
from vllm_omni.inputs.data import OmniEnginePrompt, OmniSamplingParams, OmniTextPrompt, OmniTokensPrompt


@dataclass(frozen=True)
class Deadline:
    """A point in time that is made once, where the request enters, and passed along."""

    at: float
    """``time.monotonic()`` second."""
    seconds: float
    """The time that was given."""

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline ``seconds`` from now. Raises ``RequestError``: not a number above 0."""
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise RequestError(f"timeout={seconds!r}: must be a number above 0", field="timeout", value=repr(seconds))
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
    trace_headers: Mapping[str, str] | None = None
    """``traceparent`` and ``tracestate`` of the caller's trace, where there is one."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """What goes with the prompt into the stages that read it: ``lora_request``, ``priority``."""

    @property
    def entry(self) -> Any:
        """The prompt as the stages that read it get it."""
        if not self.options:
            return self.prompt
        prompt = {"prompt": self.prompt} if isinstance(self.prompt, str) else self.prompt
        return {**prompt, **self.options}


_PROMPT_KEYS = frozenset(
    {*OmniTextPrompt.__annotations__, *OmniTokensPrompt.__annotations__, *OmniEnginePrompt.__annotations__}
)
_PROMPTS = ("prompt", "prompt_token_ids", "engine_input")
_MAPPINGS = (
    *("engine_input", "multi_modal_data", "mm_processor_kwargs"),
    *("additional_information", "reasoning_parser_kwargs"),
)


def check_prompt(prompt: Any) -> None:
    """Check the form of a prompt.

    Raises:
        RequestError: neither text nor a dictionary with known keys, no prompt in it, a value of the wrong type, or an
            empty text where nothing else carries the request.
    """
    if isinstance(prompt, str):
        _check_text("prompt", prompt)
        _check_not_empty(prompt, {})
        return
    if not isinstance(prompt, Mapping):
        raise RequestError(
            f"a prompt is text or a dictionary, got {type(prompt).__name__}", field="prompt", value=repr(prompt)[:100]
        )
    for key in prompt:
        if key not in _PROMPT_KEYS:
            raise RequestError(f"prompt: unknown key {key!r}{nearest(str(key), _PROMPT_KEYS)}", field=str(key))
    if not any(key in prompt for key in _PROMPTS):
        raise RequestError('a prompt dictionary needs "prompt" or "prompt_token_ids"', field="prompt")
    for key in ("prompt", "negative_prompt"):
        if key in prompt:
            _check_text(key, prompt[key])
    for key in _MAPPINGS:
        value = prompt.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise RequestError(f"{key} must be a dictionary, got {type(value).__name__}", field=key)
    if "prompt_token_ids" in prompt:
        _check_tokens(prompt["prompt_token_ids"])
    elif "engine_input" not in prompt:
        _check_not_empty(prompt["prompt"], prompt)


def _check_not_empty(text: str, beside: Mapping[str, Any]) -> None:
    """Text without a character is mostly a variable that was not set; " " draws without a prompt."""
    if not text and not beside.get("multi_modal_data") and not beside.get("additional_information"):
        raise RequestError(
            'prompt: the text is empty; give a blank (" ") to go without words', field="prompt", value=""
        )


def _check_tokens(tokens: Any) -> None:
    if not isinstance(tokens, Sequence) or isinstance(tokens, (str, bytes)):
        raise RequestError(
            f"prompt_token_ids must be a list of token ids, got {type(tokens).__name__}", field="prompt_token_ids"
        )
    if not all(isinstance(token, int) for token in tokens):
        wrong = next(token for token in tokens if not isinstance(token, int))
        raise RequestError(
            f"prompt_token_ids must be whole numbers, got {type(wrong).__name__}", field="prompt_token_ids"
        )


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{name} must be text, got {type(text).__name__}", field=name, value=repr(text)[:100])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name}: half a surrogate pair at character {error.start}, which is no text", field=name
        ) from error
