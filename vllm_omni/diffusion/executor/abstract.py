"""How a diffusion engine reaches its ranks.

One method does the work: ``execute`` hands a plan to every rank and returns rank 0's result. Everything is called from
the engine's one thread. An executor is made by ``create_executor`` and owns its ranks: they are gone when ``close``
returns, and die with the process when it is killed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.ipc import StepPlan, StepResult
from vllm_omni.errors import ConfigError


class DiffusionExecutor(ABC):
    """Starts the ranks of one stage in ``__init__`` and hands them work."""

    @abstractmethod
    def __init__(self, od_config: OmniDiffusionConfig) -> None:
        """Raises ``ConfigError`` when the stage cannot be started as configured, ``StageError`` when a rank fails."""

    @abstractmethod
    def execute(self, plan: StepPlan) -> StepResult:
        """Have every rank carry out ``plan``; blocks until all have answered.

        A unit that failed on any rank has ``StepResult.error``, and the ranks are ready for the next plan.

        Raises:
            StageDeadError: a rank is gone, or did not answer.
        """

    @abstractmethod
    def collective_rpc(self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        """Call a method of the worker on every rank; one result a rank, in the order of ranks.

        Raises:
            OmniError: what the method raised on the first rank that failed.
            StageDeadError: a rank is gone.
        """

    @abstractmethod
    def check_health(self) -> None:
        """Raises ``StageDeadError`` when a rank is gone."""

    @abstractmethod
    def facts(self) -> list[dict[str, Any]]:
        """What each rank said of itself when it was ready."""

    @abstractmethod
    def pids(self) -> list[int]:
        """Process ids of the ranks beside the engine's process."""

    @abstractmethod
    def close(self) -> None:
        """Stop the ranks. Idempotent."""


def local_ranks(od_config: OmniDiffusionConfig) -> list[int]:
    """Device index of each rank, by ``od_config.devices``.

    Raises:
        ConfigError: ``devices`` is not a list of as many different indices as there are ranks.
    """
    world_size = od_config.parallel_config.world_size
    if od_config.devices is None:
        return list(range(world_size))
    parts = [part.strip() for part in od_config.devices.split(",")]
    indices = [int(part) for part in parts if part.isdecimal()]
    if len(indices) != len(parts) or len(set(indices)) != len(indices) or len(indices) != world_size:
        raise ConfigError(
            f"devices={od_config.devices!r}: expected {world_size} different indices such as "
            f"{','.join(map(str, range(world_size)))!r}, one for each rank of the parallel sizes",
            field="devices",
        )
    return indices


def create_executor(od_config: OmniDiffusionConfig) -> DiffusionExecutor:
    """The executor that ``od_config.executor_backend`` names, with its ranks ready."""
    if od_config.executor_backend == "mp":
        from vllm_omni.diffusion.executor.multiproc_executor import MultiprocDiffusionExecutor

        return MultiprocDiffusionExecutor(od_config)
    # Imports models and vLLM: only where the worker lives in this process.
    from vllm_omni.diffusion.executor.uniproc_executor import UniprocDiffusionExecutor

    return UniprocDiffusionExecutor(od_config)
