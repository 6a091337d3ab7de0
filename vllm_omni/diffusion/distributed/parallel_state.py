"""Process groups of a diffusion stage: one grid of ranks, one group a kind of parallelism.

The grid's order is tensor, sequence, pipeline, guidance (CFG), data, innermost first: ranks that talk most sit closest.
Tensor-parallel groups are vLLM's own, so that its parallel linear layers work unchanged; the others stand beside them.

A process belongs to one grid at a time. Several engines may share it (each calls ``init_parallel`` and
``destroy_parallel``); the groups go away with the last of them.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import ConfigError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

_AXES = ("tp", "sp", "pp", "cfg", "dp")


@dataclass(frozen=True)
class RankGrid:
    """Sizes of the axes of the rank grid and the groups along each."""

    tp: int = 1
    sp: int = 1
    pp: int = 1
    cfg: int = 1
    dp: int = 1

    @classmethod
    def from_config(cls, config: DiffusionParallelConfig) -> RankGrid:
        """The grid that ``config`` asks for."""
        return cls(
            tp=config.tensor_parallel_size,
            sp=config.ulysses_degree * config.ring_degree,
            pp=config.pipeline_parallel_size,
            cfg=config.cfg_parallel_size,
            dp=config.data_parallel_size,
        )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tp * self.sp * self.pp * self.cfg * self.dp

    def groups(self, axis: str) -> list[list[int]]:
        """Every group of ranks along ``axis``: the ranks that differ in that coordinate alone."""
        outer_first = [getattr(self, name) for name in reversed(_AXES)]
        ranks = torch.arange(self.world_size).reshape(outer_first)
        dim = len(_AXES) - 1 - _AXES.index(axis)
        rows: list[list[int]] = ranks.movedim(dim, -1).reshape(-1, getattr(self, axis)).tolist()
        return rows


@dataclass
class _State:
    grid: RankGrid
    rank: int
    device: torch.device
    vllm_config: Any
    cfg_group: Any
    users: int = 1


_lock = threading.Lock()
_state: _State | None = None


def init_parallel(
    parallel_config: DiffusionParallelConfig,
    *,
    rank: int = 0,
    local_rank: int = 0,
    init_method: str | None = None,
    backend: str = "gloo",
    timeout_s: float = 600.0,
) -> None:
    """Join the process groups of a stage. Collective over all its ranks; one rank alone needs no port and no file.

    Args:
        parallel_config: the parallel sizes.
        rank: this process's place in the grid.
        local_rank: index of this process's device on the host.
        init_method: where the ranks meet (``tcp://host:port`` or ``file:///path``); not needed for one rank.
        backend: ``nccl`` (the device is ``cuda:local_rank``) or ``gloo`` (the CPU).
        timeout_s: seconds that a collective may take.

    Raises:
        ConfigError: the process already belongs to another grid, or the arguments do not fit together.
    """
    global _state
    grid = RankGrid.from_config(parallel_config)
    device = torch.device("cuda", local_rank) if backend == "nccl" else torch.device("cpu")
    if not 0 <= rank < grid.world_size:
        raise ConfigError(f"rank={rank}: the parallel sizes make {grid.world_size} ranks", field="parallel_config")
    with _lock:
        if _state is not None:
            if (_state.grid, _state.rank, _state.device) != (grid, rank, device):
                raise ConfigError(
                    f"this process is rank {_state.rank} of {_state.grid} on {_state.device}; it cannot also be rank "
                    f"{rank} of {grid} on {device}. Start the second stage in a process of its own",
                    field="parallel_config",
                )
            _state.users += 1
            return
        _state = _start(grid, rank, local_rank, init_method, backend, timeout_s, device)


def initialize_model_parallel(
    data_parallel_size: int = 1,
    cfg_parallel_size: int = 1,
    sequence_parallel_size: int = 1,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    **place: Any,
) -> None:
    """``init_parallel`` by sizes alone, for code that runs a transformer or a pipeline without an engine around it.

    Args:
        data_parallel_size: copies.
        cfg_parallel_size: ranks that share the branches of classifier-free guidance.
        sequence_parallel_size: ranks that share the sequence.
        tensor_parallel_size: ranks that share the weight matrices.
        pipeline_parallel_size: ranks that share the blocks.
        **place: ``rank``, ``local_rank``, ``init_method``, ``backend``, ``timeout_s``, as ``init_parallel`` takes them;
            one rank needs none.

    Raises:
        ConfigError: as ``init_parallel``; a size below 1.
    """
    config = DiffusionParallelConfig(
        data_parallel_size=data_parallel_size,
        cfg_parallel_size=cfg_parallel_size,
        sequence_parallel_size=sequence_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
    )
    init_parallel(config, **place)


def _start(
    grid: RankGrid,
    rank: int,
    local_rank: int,
    init_method: str | None,
    backend: str,
    timeout_s: float,
    device: torch.device,
) -> _State:
    from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state as vllm_state

    if torch.distributed.is_initialized():
        raise ConfigError("torch.distributed was already initialised in this process by something else")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    if grid.world_size == 1:
        torch.distributed.init_process_group(
            backend=backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    elif init_method is None:
        raise ConfigError(f"{grid.world_size} ranks need an init_method", field="parallel_config")
    if device.type == "cpu" and grid.world_size > 1:
        # vLLM's CPU ranks talk through named shared memory when this agrees among them. Different names keep them on
        # gloo: nothing is then left behind by a rank that is killed.
        os.environ.setdefault("VLLM_DIST_IDENT", f"vllm-omni-{os.getpid()}")
    vllm_config = VllmConfig(parallel_config=ParallelConfig(distributed_timeout_seconds=max(1, round(timeout_s))))
    with set_current_vllm_config(vllm_config):
        vllm_state.init_distributed_environment(
            grid.world_size, rank, init_method or "hash://", local_rank, backend, timeout=timeout
        )
        # vLLM's grid is outer x tp with tp innermost, as ours; its other axes stay 1.
        vllm_state.initialize_model_parallel(tensor_model_parallel_size=grid.tp, backend=backend)
        cfg_group = None
        if grid.cfg > 1:
            cfg_group = vllm_state.init_model_parallel_group(
                grid.groups("cfg"), local_rank, backend, group_name="omni_cfg"
            )
    logger.debug("rank %d of %s on %s", rank, grid, device)
    return _State(grid, rank, device, vllm_config, cfg_group)


def destroy_parallel() -> None:
    """Leave the groups; the last user of the process destroys them. Does nothing when there are none."""
    global _state
    with _lock:
        if _state is None:
            return
        _state.users -= 1
        if _state.users > 0:
            return
        from vllm.distributed import parallel_state as vllm_state

        if _state.cfg_group is not None:
            _state.cfg_group.destroy()
        vllm_state.destroy_model_parallel()
        vllm_state.destroy_distributed_environment()
        _state = None


def is_initialized() -> bool:
    """Whether this process belongs to a grid."""
    return _state is not None


def _current() -> _State:
    if _state is None:
        raise ConfigError("no process groups: call init_parallel first")
    return _state


def get_grid() -> RankGrid:
    """The rank grid of this process."""
    return _current().grid


def get_rank() -> int:
    """This process's place in the grid."""
    return _current().rank


def get_device() -> torch.device:
    """The device of this rank."""
    return _current().device


def get_tp_group() -> Any:
    """Tensor-parallel group (vLLM's ``GroupCoordinator``)."""
    from vllm.distributed.parallel_state import get_tp_group as vllm_tp_group

    _current()
    return vllm_tp_group()


def get_tp_world_size() -> int:
    """Ranks that share the weight matrices; 1 outside of any grid."""
    return 1 if _state is None else _state.grid.tp


def get_cfg_group() -> Any | None:
    """Group that shares the branches of classifier-free guidance (``GroupCoordinator``), or None for one rank."""
    return None if _state is None else _state.cfg_group


def get_cfg_world_size() -> int:
    """Ranks that share the branches of classifier-free guidance; 1 outside of any grid."""
    return 1 if _state is None else _state.grid.cfg


def get_cfg_rank() -> int:
    """This rank's place in its guidance group; 0 outside of any grid."""
    group = get_cfg_group()
    return 0 if group is None else int(group.rank_in_group)


def vllm_config_context() -> AbstractContextManager[Any]:
    """Context in which vLLM's layers can be built."""
    from vllm.config import set_current_vllm_config

    context: AbstractContextManager[Any] = set_current_vllm_config(_current().vllm_config)
    return context
