"""One rank, in the engine's own process: nothing is copied and nothing forwarded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.executor.abstract import DiffusionExecutor, local_ranks
from vllm_omni.diffusion.ipc import StepPlan, StepResult
from vllm_omni.diffusion.worker.diffusion_worker import WorkerWrapperBase
from vllm_omni.errors import StageDeadError


class UniprocDiffusionExecutor(DiffusionExecutor):
    """Holds the worker itself."""

    def __init__(self, od_config: OmniDiffusionConfig) -> None:
        (local_rank,) = local_ranks(od_config)
        self._wrapper: WorkerWrapperBase | None = WorkerWrapperBase(local_rank, od_config, rank=0)
        self._facts = self._wrapper.worker.facts()

    def _alive(self) -> WorkerWrapperBase:
        if self._wrapper is None:
            raise StageDeadError("the stage is closed")
        return self._wrapper

    def execute(self, plan: StepPlan) -> StepResult:
        return self._alive().worker.execute(plan)

    def collective_rpc(self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        return [self._alive().execute_method(method, *args, **(kwargs or {}))]

    def check_health(self) -> None:
        self._alive()

    def facts(self) -> list[dict[str, Any]]:
        return [self._facts]

    def pids(self) -> list[int]:
        return []

    def close(self) -> None:
        if self._wrapper is not None:
            wrapper, self._wrapper = self._wrapper, None
            wrapper.worker.shutdown()
