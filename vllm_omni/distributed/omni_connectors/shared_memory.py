"""``SharedMemoryConnector``: the default, for stages on one host. Needs no server and no configuration."""

from __future__ import annotations

from typing import Any

from vllm_omni.distributed.omni_connectors.base import OmniConnectorBase
from vllm_omni.distributed.omni_connectors.utils.arena import Arena, Ref
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.errors import ConfigError, ConnectorError


class SharedMemoryConnector(OmniConnectorBase):
    """Small values travel inside the metadata; larger leaves are written once to shared memory and mapped by the
    reader.

    Args:
        shm_threshold_bytes: leaves larger than this go to shared memory.

    Raises:
        ConfigError: a bad threshold.
    """

    def __init__(self, shm_threshold_bytes: int = 65536) -> None:
        if isinstance(shm_threshold_bytes, bool) or not isinstance(shm_threshold_bytes, int) or shm_threshold_bytes < 0:
            raise ConfigError(
                f"shm_threshold_bytes={shm_threshold_bytes!r}: must be a whole number, 0 or more",
                field="shm_threshold_bytes",
            )
        self._arena = Arena()
        self._codec = Codec(self._arena, shm_threshold_bytes)
        self._stored: dict[tuple[str, str, str], tuple[dict[str, Any], list[Ref]]] = {}

    def put(self, from_stage: str, to_stage: str, put_key: str, data: Any) -> tuple[bool, int, dict[str, Any] | None]:
        if (from_stage, to_stage, put_key) in self._stored:
            self._drop((from_stage, to_stage, put_key))
        refs: list[Ref] = []
        payload = b"".join(self._codec.encode(data, refs=refs))
        size = len(payload) + sum(ref.nbytes for ref in refs)
        metadata = {"payload": payload, "size": size}
        if len(self._stored) >= _SWEEP_AT:
            self._sweep()
        self._stored[from_stage, to_stage, put_key] = (metadata, refs)
        return True, size, metadata

    def get(
        self, from_stage: str, to_stage: str, get_key: str, metadata: dict[str, Any] | None = None
    ) -> tuple[Any, int] | None:
        stored = self._stored.pop((from_stage, to_stage, get_key), None)
        if metadata is None:
            if stored is None:
                return None
            metadata = stored[0]
        if not isinstance(metadata.get("payload"), (bytes, bytearray, memoryview)):
            raise ConnectorError(f"{get_key}: metadata is not what put returned")
        return self._codec.decode(metadata["payload"]), metadata["size"]

    def cleanup(self, request_id: str) -> None:
        for key in [key for key in self._stored if key[2] == request_id or key[2].startswith(f"{request_id}/")]:
            self._drop(key)

    def _drop(self, key: tuple[str, str, str]) -> None:
        for ref in self._stored.pop(key)[1]:
            self._arena.cancel(ref)

    def _sweep(self) -> None:
        """Forget puts whose shared memory was consumed; puts without any are forgotten oldest first."""
        for key, (_, refs) in list(self._stored.items()):
            if not any(self._arena.held(ref) for ref in refs):
                del self._stored[key]

    def health(self) -> dict[str, Any]:
        return {"status": "healthy", "connector": "SharedMemoryConnector", "stored": len(self._stored)} | (
            self._arena.stats()
        )

    def close(self) -> None:
        self._stored.clear()
        self._arena.close()


_SWEEP_AT = 1024
