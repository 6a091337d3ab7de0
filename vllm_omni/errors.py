"""Typed errors.

::

    OmniError
     +-- ConfigError          a setting is wrong or cannot be honoured (raised before anything starts)
     +-- RequestError         one request's input is wrong: names the field, the value and what is allowed
     |    +-- NotFoundError   it names something that is not there
     |    +-- TooLargeError   it is larger than allowed
     +-- OverloadError        as many requests are open as may be
     +-- StageError           a stage failed on a request; ``stage_id`` says which
     |    +-- StageDeadError  the stage's process (or a rank of it) is gone
     |    +-- OutOfMemoryError  the request did not fit; the stage goes on
     +-- DeadlineError        time ran out; ``phase`` says in what
     +-- ConnectorError       a payload could not be put, found or read
     +-- RequestAborted       the caller aborted the request

Catch ``OmniError`` for all of them, a leaf for one. Errors cross process boundaries as ``to_wire()`` dictionaries.
The HTTP status of each stands in ``HTTP_STATUS`` and nowhere else.
"""

from typing import Any


class OmniError(Exception):
    """Root of all errors that the package raises on purpose.

    Attributes:
        message: what went wrong and what to do.
        details: plain values that locate it (field, stage_id, phase, request_id, ...); they survive the wire.
        outputs: what the other prompts of the same ``Omni.generate`` call made.
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = {key: value for key, value in details.items() if value is not None}
        self.outputs: list[Any] = []

    def to_wire(self) -> dict[str, Any]:
        """Plain dictionary for messages; ``from_wire`` is the inverse."""
        return {"error": type(self).__name__, "message": self.message, "details": self.details}


class ConfigError(OmniError, ValueError):
    """A setting is wrong, unknown, or cannot be honoured by the model or the platform. ``details['field']`` names
    it."""


class RequestError(OmniError, ValueError):
    """Bad input of one request. ``details`` holds ``field``, ``value`` and ``allowed``."""


class NotFoundError(RequestError):
    """A request names a model, a voice or a file that is not there."""


class TooLargeError(RequestError):
    """A part of a request has more bytes, pixels or seconds than allowed."""


class OverloadError(OmniError):
    """As many requests are open as may be. ``details['retry_after']``: seconds after which to ask again."""


class StageError(OmniError, RuntimeError):
    """A stage failed while it worked on a request. ``details['stage_id']`` names it; ``cause`` holds the traceback."""


class StageDeadError(StageError):
    """The process of a stage, or one of its ranks, is gone; every open request of the stage gets this."""


class OutOfMemoryError(StageError):
    """The request did not fit into the device's memory. The stage freed its caches and goes on."""


class DeadlineError(OmniError, TimeoutError):
    """Time ran out. ``details['phase']`` says in which phase, ``details['stage_id']`` in which stage."""


class ConnectorError(OmniError, RuntimeError):
    """A payload could not be stored, found or read by an OmniConnector."""


class RequestAborted(OmniError):
    """The caller aborted the request."""


HTTP_STATUS: dict[type[OmniError], int] = {
    RequestError: 400,
    NotFoundError: 404,
    TooLargeError: 413,
    OverloadError: 429,
    ConfigError: 400,
    RequestAborted: 499,
    StageError: 500,
    ConnectorError: 500,
    StageDeadError: 503,
    OutOfMemoryError: 503,
    DeadlineError: 504,
}

_BY_NAME: dict[str, type[OmniError]] = {cls.__name__: cls for cls in (*HTTP_STATUS, OmniError)}


def from_wire(data: dict[str, Any]) -> OmniError:
    """Rebuild the error that ``to_wire`` wrote; an unknown class becomes a ``StageError``."""
    cls = _BY_NAME.get(data["error"], StageError)
    return cls(data["message"], **data["details"])


def http_status(error: BaseException) -> int:
    """HTTP status of ``error``: the most specific row of ``HTTP_STATUS``, else 500."""
    for cls in type(error).__mro__:
        if cls in HTTP_STATUS:
            return HTTP_STATUS[cls]
    return 500
