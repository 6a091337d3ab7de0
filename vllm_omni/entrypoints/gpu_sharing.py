"""What ``gpu_sharing`` says: whether stages on one GPU take turns on it or are clients of NVIDIA's MPS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_omni.config.stage import StageConfig
from vllm_omni.distributed.mps import PIPES, MpsDaemon, check_gpu, existing_daemon
from vllm_omni.entrypoints.omni_args import DIFFUSION_ENGINE, OmniSetup, engine_class, stage_engine_args
from vllm_omni.entrypoints.stage_arguments import runs_on_vllm
from vllm_omni.errors import ConfigError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

DAEMON_SECONDS = 30.0
"""Within these the MPS daemon must be up, or within ``stage_init_timeout`` when that is shorter."""


class GpuSharing:
    """The MPS daemon of an engine, if it has one, and the stages that are its clients."""

    def __init__(self, daemon: MpsDaemon | None = None, clients: Sequence[int] = ()) -> None:
        self._daemon = daemon
        self._clients = frozenset(clients)

    def env(self, stage_id: int) -> Mapping[str, str]:
        """What the processes of a stage get in their environment."""
        return self._daemon.env if self._daemon is not None and stage_id in self._clients else {}

    def close(self) -> None:
        """End the daemon, after the stages. Idempotent."""
        if self._daemon is not None:
            self._daemon.close()


def share_gpus(setup: OmniSetup) -> GpuSharing:
    """Do what ``gpu_sharing`` says, before the first stage is started.

    Raises:
        ConfigError: there is no GPU, no two stages share one, or MPS cannot be had.
        DeadlineError: the MPS daemon was not up in time.
    """
    if setup.pipeline.runtime.gpu_sharing == "time_slices":
        return GpuSharing()
    check_gpu()
    gpus = {stage.stage_id: gpus_of(stage) for stage in setup.pipeline.stages}
    on = {gpu: [i for i, used in gpus.items() if gpu in used] for gpu in sorted(frozenset().union(*gpus.values()))}
    if all(len(stages) < 2 for stages in on.values()):
        rows = ", ".join(f"GPU {gpu}: stage {stages[0]}" for gpu, stages in on.items())
        raise ConfigError(
            f"gpu_sharing='mps': no two stages share a GPU ({rows or 'none uses one'}); leave the setting out",
            field="gpu_sharing",
        )
    there = existing_daemon()
    if there is not None:
        logger.info("stages share GPUs under the MPS daemon that is there (CUDA_MPS_PIPE_DIRECTORY=%s)", there)
        return GpuSharing()
    daemon = MpsDaemon(min(DAEMON_SECONDS, setup.args.stage_init_timeout))
    clients = [stage_id for stage_id, used in gpus.items() if used]
    logger.info(
        "stages %s are clients of an MPS daemon of their own (CUDA_MPS_PIPE_DIRECTORY=%s)", clients, daemon.env[PIPES]
    )
    return GpuSharing(daemon, clients)


def gpus_of(stage: StageConfig) -> frozenset[str]:
    """Indices of the GPUs that a stage runs on; of an engine that is not this package's only what ``devices`` says."""
    values = stage_engine_args(stage)
    devices, ranks = values.get("devices"), 0
    if runs_on_vllm(stage):
        ranks = values.get("tensor_parallel_size", 1) * values.get("pipeline_parallel_size", 1)
    elif engine_class(stage) == DIFFUSION_ENGINE:
        from vllm_omni.diffusion.data import OmniDiffusionConfig

        config = OmniDiffusionConfig.from_kwargs(**values)
        if config.device_type != "cuda":
            return frozenset()
        ranks = config.parallel_config.world_size
    names = map(str, range(ranks)) if devices is None else (name.strip() for name in str(devices).split(","))
    return frozenset(names)
