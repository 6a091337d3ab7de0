"""Arguments of ``Omni`` and ``AsyncOmni``, and the pipeline configuration that they and the model lead to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllm_omni import envs
from vllm_omni.config.schema import parse
from vllm_omni.config.stage import (
    GpuSharing,
    PipelineConfig,
    Row,
    StageConfig,
    load_stage_configs,
    single_diffusion_stage,
)
from vllm_omni.entrypoints.stage_arguments import by_stage, overridden, runs_on_vllm, with_arguments
from vllm_omni.errors import ConfigError
from vllm_omni.logger import init_logger

if TYPE_CHECKING:
    from vllm_omni.engine.ar_launch import ARStageSpec

STAGE_CONFIGS = Path(__file__).parent.parent / "model_executor" / "stage_configs"
DETAILED = ("model", "worker", "all")
DIFFUSION_ENGINE = "vllm_omni.diffusion.diffusion_engine.DiffusionEngine"


@dataclass(frozen=True, kw_only=True)
class OmniArgs:
    """What ``Omni`` and ``AsyncOmni`` themselves take; every other argument is one of ``OmniDiffusionConfig``."""

    model: str | None = None
    """Folder of the checkpoint, or a hub name that the local cache holds. Default: the tiny one of the package."""
    stage_configs_path: str | None = None
    """Stage configuration file (YAML). Without it: one diffusion stage, or the file that comes with the package."""
    log_stats: bool = False
    """Log one line of times per finished request."""
    stage_init_timeout: float = 300.0
    """Seconds until every single stage must be ready."""
    init_timeout: float = 600.0
    """Seconds until all stages together must be ready."""
    trace: str | None = None
    """File for a trace of every request (JSON, for ui.perfetto.dev and chrome://tracing); it is replaced."""
    otlp_traces_endpoint: str | None = None
    """Where a collector takes traces by OTLP, such as http://localhost:4317."""
    collect_detailed_traces: Sequence[str] = ()
    """What the collector gets in detail (model, worker, all): steps of stages, and vLLM's own details."""
    heartbeat_timeout: float = 20.0
    """Seconds without a sign of life after which a stage whose process is frozen is given up; 0: never."""
    stall_timeout: float = 300.0
    """Seconds after which a stage that has work and does not get on with it is given up; 0: never. A step that takes
    long gets on: each layer counts. The first step compiles, which does not."""
    shm_threshold_bytes: int = 65536
    """Tensors, arrays, images and bytes larger than this travel between processes in shared memory, not in messages."""
    worker_backend: Literal["multi_process"] = "multi_process"
    """How stages are run: one process each on this machine."""
    gpu_sharing: GpuSharing | None = None
    """How stages that share a GPU run on it: ``time_slices``: in turns; ``mps``: at the same time, by NVIDIA's MPS,
    whose daemon starts and ends with the stages. Default: what the stage configuration says, or ``time_slices``."""
    ray_address: str | None = None
    """Address of a Ray cluster; only for ``worker_backend="ray"``, which is not there yet."""
    batch_timeout: float = 0.0
    """Seconds that an idle stage waits for more requests before it starts its first step. A busy stage takes requests
    in between steps anyway, so waiting pays only where requests come in bursts."""
    default_sampling_params: Mapping[str, Any] = field(default_factory=dict)
    """By stage id: sampling parameters of requests that bring none; wins over the stage configuration."""
    stage_overrides: Mapping[str, Any] = field(default_factory=dict)
    """By stage id: engine arguments of that stage alone; wins over everything."""

    def __post_init__(self) -> None:
        for name in ("stage_init_timeout", "init_timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be above 0", field=name)
        for name in ("shm_threshold_bytes", "batch_timeout", "heartbeat_timeout", "stall_timeout"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must not be negative", field=name)
        for module in self.collect_detailed_traces:
            if module not in DETAILED:
                raise ConfigError(
                    f"collect_detailed_traces: {module!r}: allowed are {', '.join(DETAILED)}",
                    field="collect_detailed_traces",
                )
        if self.collect_detailed_traces and self.otlp_traces_endpoint is None:
            raise ConfigError(
                "collect_detailed_traces: needs otlp_traces_endpoint, where they go", field="collect_detailed_traces"
            )
        if self.ray_address is not None:
            raise ConfigError(
                f'ray_address={self.ray_address!r}: stages run as processes of this machine (worker_backend="ray" is '
                "not there yet)",
                field="ray_address",
            )


@dataclass(frozen=True)
class OmniSetup:
    """Everything that is known before a process is started."""

    args: OmniArgs
    pipeline: PipelineConfig
    sources: Mapping[str, str]
    """Argument -> where it came from."""

    def rows(self) -> list[Row]:
        """(path, value, source) of every value, defaults of engines included: what ``vllm-omni config show`` prints."""
        own = [(spec.name, getattr(self.args, spec.name)) for spec in fields(OmniArgs)]
        out: list[Row] = [(name, value, self.sources.get(name, "default")) for name, value in own]
        out.extend(self.pipeline.rows())
        for index, stage in enumerate(self.pipeline.stages):
            if not runs_on_vllm(stage) and engine_class(stage) == DIFFUSION_ENGINE:
                out.extend(_diffusion_defaults(stage, f"stage_args[{index}].engine_args"))
        return out


def resolve(values: Mapping[str, Any], source: str | Mapping[str, str] = "Omni() argument") -> OmniSetup:
    """From the arguments of ``Omni`` to the checked configuration; starts and loads nothing.

    Args:
        values: ``model`` and all keyword arguments.
        source: where they came from, for ``rows``; one text for all, or one per argument.

    Raises:
        ConfigError: an unknown or wrong argument, or no model.
    """
    sources = dict.fromkeys(values, source) if isinstance(source, str) else dict(source)
    own_names = {spec.name for spec in fields(OmniArgs)}
    own = {name: value for name, value in values.items() if name in own_names}
    rest = {name: value for name, value in values.items() if name not in own_names}
    if own.get("worker_backend") == "ray":
        raise ConfigError('worker_backend="ray" is not there yet; use "multi_process"', field="worker_backend")
    for name in ("default_sampling_params", "stage_overrides"):
        if isinstance(own.get(name), str):
            own[name] = _json(name, own[name])
        if isinstance(own.get(name), Mapping):
            own[name] = {str(key): item for key, item in own[name].items()}
    if isinstance(own.get("model"), os.PathLike):
        own["model"] = os.fspath(own["model"])
    args = parse(OmniArgs, own, "Omni()")
    engine_args = _engine_args(rest)
    pipeline = overridden(_pipeline(args, engine_args, sources), args.stage_overrides, sources)
    pipeline = _with_default_params(pipeline, args, sources)
    if args.gpu_sharing is not None:
        lines = {**pipeline.sources, "runtime.gpu_sharing": sources.get("gpu_sharing", "default")}
        pipeline = replace(pipeline, runtime=replace(pipeline.runtime, gpu_sharing=args.gpu_sharing), sources=lines)
    for stage in pipeline.stages:
        _check_engine(stage)
    return OmniSetup(args, pipeline, sources)


DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "data" / "default_model"


def default_model() -> str:
    """The model of ``Omni()`` without arguments: the tiny one that comes with the package.

    Raises:
        ConfigError: the package was installed without it.
    """
    if not (DEFAULT_MODEL / "model_index.json").is_file():
        raise ConfigError("model is missing: give the folder or the hub name of a checkpoint", field="model")
    # The logger is made here: a program may set the level after it imported this module.
    init_logger(__name__).info("no model was given: using the tiny one of the package, which draws simple shapes")
    return str(DEFAULT_MODEL)


def engine_class(stage: StageConfig) -> str:
    """Qualified name of the ``StageEngine`` of a stage that does not run on vLLM."""
    if "engine_cls" in stage.engine_args:
        return str(stage.engine_args["engine_cls"])
    return DIFFUSION_ENGINE


def ar_specs(setup: OmniSetup, stages: Sequence[StageConfig], thresholds: Sequence[int]) -> list[ARStageSpec]:
    """What vLLM's engines of ``stages`` are started with."""
    from vllm_omni.engine.ar_launch import ARStageSpec

    args, common = setup.args, {}
    if args.otlp_traces_endpoint is not None:
        modules = list(args.collect_detailed_traces) or None
        common = {"otlp_traces_endpoint": args.otlp_traces_endpoint, "collect_detailed_traces": modules}
    return [
        ARStageSpec(
            stage.stage_id,
            "generation" if stage.stage_type == "generation" else "ar",
            {**common, **stage_engine_args(stage)},
            threshold,
            stage.final_output_type if stage.final_output else None,
            bool(setup.pipeline.async_chunk),
        )
        for stage, threshold in zip(stages, thresholds, strict=True)
    ]


def _engine_args(rest: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that go to the diffusion engine, in plain form; what others call by another name is settled here."""
    from vllm_omni.diffusion.data import DiffusionParallelConfig

    out = dict(rest)
    backend = out.pop("cache_backend", "none")
    if backend not in (None, "none"):
        raise ConfigError(f'cache_backend={backend!r}: only "none" is there yet', field="cache_backend")
    if out.get("cache_config") is not None:
        raise ConfigError('cache_config needs a cache_backend, and only "none" is there yet', field="cache_config")
    out.pop("cache_config", None)
    if isinstance(out.get("parallel_config"), DiffusionParallelConfig):
        out["parallel_config"] = dict(vars(out["parallel_config"]))
    dtype = out.get("dtype")
    if type(dtype).__module__ == "torch" and type(dtype).__name__ == "dtype":
        out["dtype"] = str(dtype).removeprefix("torch.")
    return out


def _check_num_gpus(num_gpus: Any, engine_args: Mapping[str, Any]) -> None:
    """``num_gpus`` says again what the parallel sizes say; it may not contradict them."""
    from vllm_omni.diffusion.data import OmniDiffusionConfig

    ranks = OmniDiffusionConfig.from_kwargs(**engine_args).parallel_config.world_size
    if num_gpus != ranks:
        raise ConfigError(
            f"num_gpus={num_gpus!r} but the parallel sizes make {ranks} rank(s); set tensor_parallel_size or another "
            "parallel size, num_gpus follows from them",
            field="num_gpus",
        )


def _pipeline(args: OmniArgs, engine_args: dict[str, Any], sources: Mapping[str, str]) -> PipelineConfig:
    num_gpus = engine_args.pop("num_gpus", None)
    if args.stage_configs_path is None:
        model = args.model if args.model is not None else default_model()
        path = _packaged_stages(model, engine_args.get("revision"))
        if path is None:
            pipeline = single_diffusion_stage({"model": model, **engine_args}, "Omni() argument")
            lines = {f"stage_args[0].engine_args.{name}": sources.get(name, "model") for name in engine_args}
            lines["stage_args[0].engine_args.model"] = sources.get("model", "default")
            if num_gpus is not None:
                _check_num_gpus(num_gpus, {"model": model, **engine_args})
            return replace(pipeline, sources=lines)
    else:
        path = Path(args.stage_configs_path)
    if num_gpus is not None:
        raise ConfigError("num_gpus belongs into the stages' engine_args of the stage configuration", field="num_gpus")
    return with_arguments(load_stage_configs(path), args.model, engine_args, sources)


def _packaged_stages(model: str, revision: str | None) -> Path | None:
    """The stage configuration that comes with the package for ``model``; None for a single diffusion model.

    Raises:
        ConfigError: no such checkpoint, or one that is neither.
    """
    from vllm_omni.diffusion.utils.checkpoint import model_folder, read_config

    folder = model_folder(model, revision)
    if (folder / "model_index.json").exists():
        return None
    if (folder / "config.json").exists():
        kind = str(read_config(folder, "config.json").get("model_type"))
        path = STAGE_CONFIGS / f"{kind}.yaml"
        if path.exists():
            return path
        known = sorted(entry.stem for entry in STAGE_CONFIGS.glob("*.yaml"))
        raise ConfigError(
            f"model={model!r}: no stage configuration for model_type {kind!r}; there are "
            f"{', '.join(known) or 'none'}; give stage_configs_path",
            field="model",
        )
    raise ConfigError(f"model={model!r}: neither model_index.json nor config.json in {folder}", field="model")


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: not JSON: {error}", field=name) from error


def _with_default_params(pipeline: PipelineConfig, args: OmniArgs, sources: Mapping[str, str]) -> PipelineConfig:
    stages, lines = list(pipeline.stages), dict(pipeline.sources)
    for index, values in by_stage(pipeline, "default_sampling_params", args.default_sampling_params):
        merged = {**stages[index].default_sampling_params, **values}
        stages[index] = replace(stages[index], default_sampling_params=merged)
        source = sources.get("default_sampling_params", "default")
        lines.update({f"stage_args[{index}].default_sampling_params.{name}": source for name in values})
    return replace(pipeline, stages=tuple(stages), sources=lines)


def _check_engine(stage: StageConfig) -> None:
    """Find out before a process is started that the engine's arguments are wrong."""
    if not runs_on_vllm(stage) and engine_class(stage) == DIFFUSION_ENGINE:
        from vllm_omni.diffusion.data import OmniDiffusionConfig

        OmniDiffusionConfig.from_kwargs(**stage_engine_args(stage))


def stage_engine_args(stage: StageConfig) -> dict[str, Any]:
    """What the stage's engine is built with: ``engine_args``, and ``runtime`` as far as it concerns the engine.

    Raises:
        ConfigError: the same thing is said twice, differently.
    """
    out = {name: value for name, value in stage.engine_args.items() if name != "engine_cls"}
    for name, value in (("devices", stage.runtime.devices), ("max_num_seqs", stage.runtime.max_batch_size)):
        if value is None:
            continue
        if out.get(name, value) != value:
            raise ConfigError(
                f"stage {stage.stage_id}: engine_args.{name}={out[name]!r} but runtime says {value!r}", field=name
            )
        out[name] = value
    return out


def device_table(pipeline: PipelineConfig) -> list[tuple[int, str, str]]:
    """(stage, logical devices, what they are in CUDA_VISIBLE_DEVICES) of every stage that names devices.

    Raises:
        ConfigError: a device that is no index, or beyond CUDA_VISIBLE_DEVICES.
    """
    visible = envs.CUDA_VISIBLE_DEVICES()
    rows = []
    for stage in pipeline.stages:
        if stage.runtime.devices is None:
            continue
        names = [name.strip() for name in stage.runtime.devices.split(",")]
        physical = [_physical(name, visible, stage.stage_id) for name in names]
        rows.append((stage.stage_id, ",".join(names), ",".join(physical)))
    return rows


def _physical(name: str, visible: list[str] | None, stage_id: int) -> str:
    if not name.isdigit():
        raise ConfigError(
            f"stage {stage_id}: devices: {name!r} is no index; give indices such as 0,1, relative to "
            "CUDA_VISIBLE_DEVICES",
            field="devices",
        )
    if visible is None:
        return name
    if int(name) >= len(visible):
        raise ConfigError(
            f"stage {stage_id}: devices: {name} is beyond CUDA_VISIBLE_DEVICES={','.join(visible) or '(none)'}, which "
            f"lists {len(visible)} device(s)",
            field="devices",
        )
    return visible[int(name)]


def _diffusion_defaults(stage: StageConfig, path: str) -> Iterator[Row]:
    from vllm_omni.diffusion.data import OmniDiffusionConfig

    config = OmniDiffusionConfig.from_kwargs(**stage_engine_args(stage))
    for spec in fields(OmniDiffusionConfig):
        if spec.name not in stage.engine_args and spec.name != "parallel_config":
            yield f"{path}.{spec.name}", getattr(config, spec.name), "default"
    for name, value in vars(config.parallel_config).items():
        if name not in stage.engine_args and name not in (stage.engine_args.get("parallel_config") or {}):
            yield f"{path}.parallel_config.{name}", value, "default"
