"""What vLLM and transformers raise of a checkpoint or a setting, as this package's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from vllm.exceptions import VLLMError

from vllm_omni.errors import ConfigError

_REFUSED = (VLLMError, ValueError, TypeError, OSError, NotImplementedError, StrictDataclassError)
_BROKEN = (AttributeError, LookupError, ArithmeticError)
"""A part of a checkpoint's configuration is missing, or is not what its name says."""


@contextmanager
def as_config_errors(where: str, field: str, **details: Any) -> Iterator[None]:
    """Raise a ``ConfigError`` in place of what vLLM or transformers raise.

    Args:
        where: what the message begins with.
        field: the setting at fault.
        **details: of the error.
    """
    try:
        yield
    except ConfigError:
        raise
    except _REFUSED as error:
        raise ConfigError(f"{where}: {reason(error)}", field=field, **details) from error
    except _BROKEN as error:
        raise ConfigError(f"{where}: {type(error).__name__}: {error}", field=field, **details) from error


def reason(error: BaseException) -> str:
    """The message alone, on one line."""
    if isinstance(error, ValidationError):
        found = error.errors(include_url=False, include_context=False, include_input=False)
        text = "; ".join(
            ": ".join([*map(str, each["loc"]), each["msg"].removeprefix("Value error, ")]) for each in found
        )
    else:
        text = str(error)
    return " ".join(text.split())
