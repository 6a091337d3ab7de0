"""LoRA adapters of a stage: checked and loaded before the first request that uses them is sent.

An adapter that its worker cannot load in the middle of a step would end vLLM's engine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from vllm_omni.errors import RequestError, StageDeadError, StageError

_CONFIG = "adapter_config.json"


class Adapters:
    """The adapters that requests of one stage have named.

    Args:
        enabled: whether the stage takes adapters.
        load: calls the engine's ``add_lora``, which loads an adapter unless it is loaded; raises ``StageError``.
    """

    def __init__(self, enabled: bool, load: Callable[[LoRARequest], Awaitable[Any]]) -> None:
        self._enabled = enabled
        self._load = load
        self._paths: dict[int, str] = {}

    async def ready(self, adapter: Any) -> None:
        """Return when ``adapter`` can be used.

        Raises:
            RequestError: it is none, or not there, or does not fit the model or the stage's settings.
            StageDeadError: the engine is gone.
        """
        self.check(adapter)
        try:
            await self._load(adapter)
        except StageDeadError:
            raise
        except StageError as error:
            raise _refused(adapter, f"cannot be loaded: {error.message}") from error
        self._paths[adapter.lora_int_id] = adapter.lora_path

    def check(self, adapter: Any) -> None:
        """What can be told without the engine.

        Raises:
            RequestError: as ``ready``.
        """
        if not isinstance(adapter, LoRARequest):
            raise RequestError(
                f"lora_request is a {type(adapter).__name__}; a vllm.lora.request.LoRARequest is needed",
                field="lora_request",
            )
        if not self._enabled:
            raise _refused(adapter, "the stage takes no adapters; set enable_lora: true in its engine_args")
        if not (Path(adapter.lora_path) / _CONFIG).is_file():
            raise _refused(adapter, f"there is no {_CONFIG} in {adapter.lora_path}")
        other = self._paths.get(adapter.lora_int_id, adapter.lora_path)
        if other != adapter.lora_path and not adapter.load_inplace:
            raise _refused(adapter, f"its lora_int_id {adapter.lora_int_id} is that of {other}; give it another")


def _refused(adapter: LoRARequest, why: str) -> RequestError:
    return RequestError(f"adapter {adapter.lora_name!r}: {why}", field="lora_request", value=adapter.lora_path)
