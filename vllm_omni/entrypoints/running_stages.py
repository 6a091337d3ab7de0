"""Start the stages of a configuration, whatever runs them, and end them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vllm_omni.config.stage import StageConfig
from vllm_omni.distributed.omni_connectors.factory import stage_threshold
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.engine.messages import Edge
from vllm_omni.engine.stage_seam import StageClient
from vllm_omni.entrypoints import omni_args
from vllm_omni.entrypoints.gpu_sharing import GpuSharing, share_gpus
from vllm_omni.entrypoints.stage_arguments import runs_on_vllm
from vllm_omni.entrypoints.stage_client import ProcessStageClient
from vllm_omni.entrypoints.stage_graph import direct_edges
from vllm_omni.entrypoints.stage_launch import StageHandle, StageSpec, end, launch_all

if TYPE_CHECKING:
    from vllm_omni.engine.ar_launch import ARStageHandle


@dataclass
class RunningStages:
    """The processes of all stages."""

    ours: list[StageHandle] = field(default_factory=list)
    """Stages in processes of this package."""
    on_vllm: list[ARStageHandle] = field(default_factory=list)
    """Stages in vLLM's engine processes."""
    sharing: GpuSharing = field(default_factory=GpuSharing)
    """How they share GPUs."""

    def clients(self, codec: Codec) -> dict[int, StageClient]:
        """One client a stage, by stage id."""
        clients: dict[int, StageClient] = {h.spec.stage_id: ProcessStageClient(h, codec) for h in self.ours}
        if self.on_vllm:
            from vllm_omni.engine.ar_stage_client import ARStageClient

            clients.update({h.spec.stage_id: ARStageClient(h, codec) for h in self.on_vllm})
        return dict(sorted(clients.items()))

    def close(self) -> None:
        """End every process; returns when all are gone. Idempotent."""
        if self.on_vllm:
            from vllm_omni.engine.ar_launch import end_ar_stages

            end_ar_stages(self.on_vllm)
        end(self.ours)
        self.sharing.close()


def start_stages(setup: omni_args.OmniSetup, codec: Codec) -> RunningStages:
    """Start every stage and wait until all are ready. Settings are checked before the first process is started.

    Raises:
        ConfigError: a setting is wrong or cannot be honoured.
        DeadlineError: a stage was not ready in time.
        StageDeadError: a stage's process ended while it started.
    """
    args = setup.args
    ours = [stage for stage in setup.pipeline.stages if not runs_on_vllm(stage)]
    vllm = [stage for stage in setup.pipeline.stages if runs_on_vllm(stage)]
    edges = direct_edges(setup.pipeline)
    specs = [_spec(setup, stage, edges.get(stage.stage_id)) for stage in ours]
    thresholds = [_threshold(setup, stage) for stage in vllm]
    configs = [(spec, spec.config()) for spec in omni_args.ar_specs(setup, vllm, thresholds)] if vllm else []
    running = RunningStages(sharing=share_gpus(setup))
    try:
        if specs:
            given = [replace(spec, env=running.sharing.env(spec.stage_id)) for spec in specs]
            running.ours = launch_all(given, codec, args.stage_init_timeout, args.init_timeout)
        if configs:
            from vllm_omni.engine.ar_launch import start_ar_stages

            chosen = [(replace(spec, env=running.sharing.env(spec.stage_id)), config) for spec, config in configs]
            running.on_vllm = start_ar_stages(chosen, args.stage_init_timeout)
    except BaseException:
        end(running.ours, grace=0.5)
        running.sharing.close()
        raise
    return running


def _threshold(setup: omni_args.OmniSetup, stage: StageConfig) -> int:
    targets: Sequence[int] = [int(edge.removeprefix("to_stage_")) for edge in stage.output_connectors]
    connectors = [setup.pipeline.connector(stage.stage_id, target) for target in targets]
    return stage_threshold(stage.stage_id, [c for c in connectors if c is not None], setup.args.shm_threshold_bytes)


def _spec(setup: omni_args.OmniSetup, stage: StageConfig, edge: Edge | None) -> StageSpec:
    return StageSpec(
        stage.stage_id,
        omni_args.engine_class(stage),
        omni_args.stage_engine_args(stage),
        _threshold(setup, stage),
        setup.args.batch_timeout,
        stage.runtime.max_batch_size or 64,
        edge=edge,
    )
