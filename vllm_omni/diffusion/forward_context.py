"""What layers may know of the stage and of the step they run in, without passing it through every call.

``set_forward_context`` is entered around building a model (the attention layers choose their backend then) and around
each unit of work (encode, one denoise step, decode); a profiler trace shows the latter under the name of its phase.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import ConfigError

Phase = Literal["load", "encode", "denoise", "decode", "forward"]


@dataclass(frozen=True)
class ForwardContext:
    """Facts of the current unit of work."""

    od_config: OmniDiffusionConfig
    """Configuration of the stage."""
    phase: Phase = "forward"
    """What is being done."""
    step_indices: tuple[int, ...] = ()
    """Denoise step of each request in the batch."""


_context: ContextVar[ForwardContext | None] = ContextVar("vllm_omni_forward_context", default=None)


@contextmanager
def set_forward_context(
    od_config: OmniDiffusionConfig, *, phase: Phase = "forward", step_indices: tuple[int, ...] = ()
) -> Iterator[ForwardContext]:
    """Make the facts visible to ``get_forward_context`` inside the ``with`` block."""
    context = ForwardContext(od_config, phase, step_indices)
    token = _context.set(context)
    try:
        with torch.profiler.record_function(f"omni.{phase}"):
            yield context
    finally:
        _context.reset(token)


def get_forward_context() -> ForwardContext:
    """The current context.

    Raises:
        ConfigError: outside of ``set_forward_context``.
    """
    context = _context.get()
    if context is None:
        raise ConfigError("no forward context: enter set_forward_context(od_config) first")
    return context


def is_forward_context_available() -> bool:
    """Whether there is a current context."""
    return _context.get() is not None
