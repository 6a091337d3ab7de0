"""The rank grid, and joining and leaving it within one process."""

from __future__ import annotations

import pytest
import torch

from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.distributed.parallel_state import RankGrid
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.errors import ConfigError


def test_grid_order() -> None:
    """Tensor innermost, then sequence, pipeline, guidance, data; every rank is in one group along each axis."""
    grid = RankGrid(tp=2, sp=2, cfg=2)
    assert grid.world_size == 8
    assert grid.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grid.groups("sp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert grid.groups("cfg") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert RankGrid(pp=2, dp=2).groups("dp") == [[0, 2], [1, 3]]
    config = DiffusionParallelConfig(tensor_parallel_size=2, ulysses_degree=2, ring_degree=2, cfg_parallel_size=2)
    assert RankGrid.from_config(config) == RankGrid(tp=2, sp=4, cfg=2)


def test_one_rank_again_and_again() -> None:
    """No address is needed; two users share the groups; the last one takes them away; then it can start anew."""
    config = DiffusionParallelConfig()
    for _ in range(2):
        parallel_state.init_parallel(config)
        parallel_state.init_parallel(config)
        assert get_local_device() == torch.device("cpu")
        assert parallel_state.get_tp_group().world_size == 1
        assert (parallel_state.get_rank(), parallel_state.get_cfg_rank()) == (0, 0)
        assert parallel_state.get_cfg_group() is None
        parallel_state.destroy_parallel()
        assert torch.distributed.is_initialized()
        parallel_state.destroy_parallel()
        assert not parallel_state.is_initialized()
        assert not torch.distributed.is_initialized()
    parallel_state.destroy_parallel()


def test_by_sizes() -> None:
    parallel_state.initialize_model_parallel()
    try:
        parallel_state.initialize_model_parallel(tensor_parallel_size=1, rank=0)
        assert parallel_state.get_grid() == RankGrid()
        for axis, size in (("tp", "tensor"), ("sp", "sequence"), ("pp", "pipeline"), ("cfg", "cfg"), ("dp", "data")):
            with pytest.raises(ConfigError, match=rf"cannot also be rank 1 of RankGrid\(.*{axis}=2.*\)"):
                parallel_state.initialize_model_parallel(**{f"{size}_parallel_size": 2}, rank=1)
        parallel_state.destroy_parallel()
    finally:
        parallel_state.destroy_parallel()
    with pytest.raises(ConfigError, match="2 ranks need an init_method"):
        parallel_state.initialize_model_parallel(tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="data_parallel_size=0: must be at least 1"):
        parallel_state.initialize_model_parallel(data_parallel_size=0)


def test_refused() -> None:
    config = DiffusionParallelConfig(tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="rank=2: the parallel sizes make 2 ranks"):
        parallel_state.init_parallel(config, rank=2)
    with pytest.raises(ConfigError, match="2 ranks need an init_method"):
        parallel_state.init_parallel(config, rank=0)
    with pytest.raises(ConfigError, match="call init_parallel first"):
        get_local_device()
    parallel_state.init_parallel(DiffusionParallelConfig())
    try:
        with pytest.raises(ConfigError, match="in a process of its own"):
            parallel_state.init_parallel(config, rank=0, init_method="tcp://127.0.0.1:1")
    finally:
        parallel_state.destroy_parallel()


def test_a_foreign_process_group_is_respected() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match="already initialised"):
            parallel_state.init_parallel(DiffusionParallelConfig())
    finally:
        torch.distributed.destroy_process_group()
    assert not parallel_state.is_initialized()
