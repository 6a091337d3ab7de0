"""Calls of methods of a vLLM engine by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm_omni.engine.ar_launch import ARStageHandle
from vllm_omni.errors import RequestError, StageError

_LORA = ("add_lora", "remove_lora", "list_loras", "pin_lora")


class EngineCalls:
    """What can be called in the engine of one stage."""

    def __init__(self, handle: ARStageHandle) -> None:
        self._stage_id = handle.spec.stage_id
        self._client = handle.client
        self._folder = Path(handle.config.profiler_config.torch_profiler_dir)
        self._traces: set[str] = set()

    async def run(self, method: str, *args: Any) -> Any:
        """Call ``method`` of the engine.

        Raises:
            RequestError: a trace is to be written elsewhere than the engine was told.
            StageError: there is no such method.
            Exception: whatever vLLM makes of an error in the engine.
        """
        if method == "check_health":
            await self._client.call_utility_async("get_supported_tasks")
            return None
        if method == "start_profile":
            self._check_folder(*args)
            self._traces = self._trace_files()
            return await self._client.profile_async(True)
        if method == "stop_profile":
            await self._client.profile_async(False)
            return sorted(self._trace_files() - self._traces)
        if method in _LORA:
            return await self._client.call_utility_async(method, *args)
        if method == "call":
            name, positional, named = args
            return await self._client.collective_rpc_async(name, None, tuple(positional), dict(named))
        raise StageError(f"stage {self._stage_id}: a stage on vLLM has no {method}", stage_id=self._stage_id)

    def _check_folder(self, folder: str) -> None:
        if os.path.abspath(folder) != str(self._folder):
            raise RequestError(
                f"stage {self._stage_id} writes its traces to {self._folder}, as VLLM_TORCH_PROFILER_DIR or its "
                f"profiler_config said when it was started, not to {folder}",
                field="VLLM_TORCH_PROFILER_DIR",
            )

    def _trace_files(self) -> set[str]:
        return {str(path) for path in self._folder.rglob("*") if path.is_file()}
