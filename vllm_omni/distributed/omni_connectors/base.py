"""``OmniConnectorBase``: how a payload gets from one stage to another.

A connector object lives in each process that puts or gets, is used from one thread of it, and knows bytes and keys
only.

Producer:
    ``put(from_stage, to_stage, put_key, data)``
        Stores ``data`` (any tree that ``utils.serialization`` takes) and returns ``(ok, bytes stored, metadata)``. May
        block for the copy, never for the consumer. ``metadata`` is small and plain; it travels to the consumer in a
        message. Raises ``RequestError`` when ``data`` holds something that cannot travel.
    ``cleanup(request_id)``
        Gives up what was put under ``request_id`` or ``request_id/...`` and was not fetched yet. Idempotent; for
        unknown ids too.

Consumer:
    ``get(from_stage, to_stage, get_key, metadata)``
        Returns ``(object, bytes)`` or None when nothing is there under the key. Consumes: a payload is fetched once.
        Who
        frees: the connector, when the last view of the object is gone.

Both:
    ``health()``
        Plain facts, ``{"status": "healthy", ...}``; does not block.
    ``close()``
        Frees everything this process owns. Idempotent. What was fetched before stays valid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from vllm_omni.distributed.omni_connectors.utils import serialization


class OmniConnectorBase(ABC):
    """Puts payloads on one side and gets them on the other. The module's docstring is the contract."""

    @abstractmethod
    def put(self, from_stage: str, to_stage: str, put_key: str, data: Any) -> tuple[bool, int, dict[str, Any] | None]:
        """Store ``data``; returns (stored, bytes, metadata for ``get``)."""

    @abstractmethod
    def get(
        self, from_stage: str, to_stage: str, get_key: str, metadata: dict[str, Any] | None = None
    ) -> tuple[Any, int] | None:
        """Fetch (object, bytes); None when nothing is stored under the key.

        Raises:
            ConnectorError: the payload was there, but is gone or damaged.
        """

    @abstractmethod
    def cleanup(self, request_id: str) -> None:
        """Give up what is stored for a request."""

    @abstractmethod
    def health(self) -> dict[str, Any]:
        """Plain facts about the connector."""

    @abstractmethod
    def close(self) -> None:
        """Free everything."""

    @staticmethod
    def serialize_obj(obj: Any) -> bytes:
        """``obj`` as one self-contained buffer."""
        return serialization.serialize_obj(obj)

    @staticmethod
    def deserialize_obj(data: bytes | bytearray | memoryview) -> Any:
        """The inverse of ``serialize_obj``."""
        return serialization.deserialize_obj(data)

    def __enter__(self) -> OmniConnectorBase:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
