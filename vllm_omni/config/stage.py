"""The stage configuration: which stages a model has, how they are connected, how each is run.

It is read from YAML (``stage_args``, ``runtime``, ``async_chunk``) or built in code for a model that is one diffusion
stage. ``parse_pipeline`` is the only way in; what comes out is checked and frozen. ``PipelineConfig.rows`` lists every
value with where it came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vllm_omni.config.schema import nearest, parse
from vllm_omni.config.yaml_source import read_yaml
from vllm_omni.errors import ConfigError

StageType = Literal["ar", "generation", "diffusion"]
OutputType = Literal["text", "image", "audio", "video", "latents"]
GpuSharing = Literal["time_slices", "mps"]
Row = tuple[str, Any, str]


@dataclass(frozen=True, kw_only=True)
class StageRuntime:
    """How a stage's process is run."""

    process: bool = True
    """Whether the stage has its own process; it always has, so only ``true`` is accepted."""
    devices: str | None = None
    """Logical device indices such as ``"0"`` or ``"0,1"``, relative to CUDA_VISIBLE_DEVICES; one a rank."""
    max_batch_size: int | None = None
    """Requests that the stage works on together at most."""


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """How payloads travel on an edge."""

    name: str = "SharedMemoryConnector"
    """Registered name of the connector class."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Its constructor's arguments, such as ``shm_threshold_bytes``."""


@dataclass(frozen=True, kw_only=True)
class EdgeConfig:
    """Flow control of one edge."""

    from_stage: int
    """Stage whose output goes over the edge (YAML key ``from``)."""
    to_stage: int
    """Stage that gets it (YAML key ``to``)."""
    window_size: int | None = None
    """Outputs handed over together; -1 means all, when the source has finished. Default: ``runtime.defaults``."""


@dataclass(frozen=True, kw_only=True)
class RuntimeDefaults:
    """Flow control where an edge says nothing else."""

    window_size: int | None = None
    """As in ``edges``. Default: ``async_chunk``."""
    max_inflight: int | None = None
    """Requests that may be in one stage at once; more wait in the driver. Default: no limit."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What concerns the graph as a whole."""

    enabled: bool = True
    """Whether stages run as processes; only ``true`` is accepted."""
    defaults: RuntimeDefaults = field(default_factory=RuntimeDefaults)
    """Flow control of all edges."""
    connectors: Mapping[str, ConnectorConfig] = field(default_factory=dict)
    """Connectors by the name that stages use for them."""
    edges: tuple[EdgeConfig, ...] = ()
    """Flow control of single edges; the edges themselves come from ``engine_input_source``."""
    gpu_sharing: GpuSharing = "time_slices"
    """How stages that share a GPU run on it: ``time_slices``: in turns; ``mps``: at the same time, by NVIDIA's MPS."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage."""

    stage_id: int
    """Number of the stage; unique."""
    stage_type: StageType
    """``ar`` (alias ``llm``): tokens one by one; ``generation``: one pass; ``diffusion``: denoising steps."""
    runtime: StageRuntime = field(default_factory=StageRuntime)
    """How its process is run."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of its engine; ``engine_cls`` names another ``StageEngine`` than the stage type's own."""
    engine_input_source: tuple[int, ...] = ()
    """Stages whose output it gets; none: the user's prompt."""
    custom_process_input_func: str | None = None
    """Qualified name of the function from those outputs to its input (``vllm_omni.inputs.edge``)."""
    final_output: bool = False
    """Whether the user gets its output."""
    final_output_type: OutputType = "text"
    """What kind of output it is."""
    is_comprehension: bool = False
    """Whether it is the stage that reads the user's text; its tokenizer is the model's."""
    default_sampling_params: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters of requests that bring none."""
    input_connectors: Mapping[str, str] = field(default_factory=dict)
    """``from_stage_N``: name of a connector; has to be the one that stage N names."""
    output_connectors: Mapping[str, str] = field(default_factory=dict)
    """``to_stage_N``: name of a connector. Default: shared memory with ``Omni(shm_threshold_bytes=...)``."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A whole model: stages and edges, checked."""

    stages: tuple[StageConfig, ...]
    """In order of their ids (YAML key ``stage_args``)."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """What concerns the graph as a whole."""
    async_chunk: bool | int = False
    """Outputs handed from stage to stage together while the source still works; false: all at its end, true: 1."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each given value came from: file and line, flag or argument; a value not listed is a default."""

    def window(self, source: int, target: int) -> int:
        """Outputs that edge ``source -> target`` hands over together; -1 for all."""
        for edge in self.runtime.edges:
            if (edge.from_stage, edge.to_stage) == (source, target) and edge.window_size is not None:
                return edge.window_size
        if self.runtime.defaults.window_size is not None:
            return self.runtime.defaults.window_size
        return int(self.async_chunk) or -1

    def connector(self, source: int, target: int) -> ConnectorConfig | None:
        """The connector named for edge ``source -> target``, or None for the default."""
        stage = next(stage for stage in self.stages if stage.stage_id == source)
        name = stage.output_connectors.get(f"to_stage_{target}")
        return None if name is None else self.runtime.connectors[name]

    def rows(self) -> list[Row]:
        """(path, value, source) of every value, defaults included."""
        out = list(_rows(self.async_chunk, "async_chunk", self.sources))
        for index, stage in enumerate(self.stages):
            out.extend(_rows(stage, f"stage_args[{index}]", self.sources))
        out.extend(_rows(self.runtime, "runtime", self.sources))
        return out


def _rows(value: Any, path: str, sources: Mapping[str, str]) -> Iterator[Row]:
    if isinstance(value, EdgeConfig):
        value = {"from": value.from_stage, "to": value.to_stage, "window_size": value.window_size}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {spec.name: getattr(value, spec.name) for spec in dataclasses.fields(value)}
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _rows(item, f"{path}.{key}", sources)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, EdgeConfig) for item in value):
        for index, item in enumerate(value):
            yield from _rows(item, f"{path}[{index}]", sources)
    else:
        yield path, value, source_of(path, sources)


def source_of(path: str, sources: Mapping[str, str]) -> str:
    """Where the value at ``path`` came from; ``default`` when nobody gave it."""
    return sources.get(path, "default")


def parse_pipeline(values: Mapping[str, Any], sources: Mapping[str, str], name: str) -> PipelineConfig:
    """Check plain ``values`` and build the configuration; ``name`` (a file) opens messages.

    Raises:
        ConfigError: names the file, the line and path of the value, what is wrong and what is allowed.
    """
    where = _Where(name, sources)
    where.check_keys(values, ("async_chunk", "stage_args", "runtime"), "")
    stage_values = values.get("stage_args")
    if not isinstance(stage_values, (list, tuple)) or not stage_values:
        raise ConfigError(f"{where('stage_args')}: a list of at least one stage is needed", field="stage_args")
    stages = tuple(_parse_stage(item, f"stage_args[{i}]", where) for i, item in enumerate(stage_values))
    chunk = values.get("async_chunk", False)
    if not isinstance(chunk, (bool, int)) or int(chunk) < 0:
        raise ConfigError(f"{where('async_chunk')}: {chunk!r}: allowed are true, false or a count", field="async_chunk")
    runtime = _parse_runtime(values.get("runtime") or {}, where)
    config = PipelineConfig(stages=stages, runtime=runtime, async_chunk=chunk, sources=dict(sources))
    from vllm_omni.config.graph_check import check_graph

    check_graph(config, where)
    return config


def load_stage_configs(path: str | Path) -> PipelineConfig:
    """Read a stage configuration file.

    Raises:
        ConfigError: as ``parse_pipeline``.
    """
    values, lines = read_yaml(path)
    return parse_pipeline(values, lines, str(path))


class _Where:
    """Turns a path into ``file:line: path`` for messages."""

    def __init__(self, name: str, sources: Mapping[str, str]) -> None:
        self.name = name
        self.sources = sources

    def __call__(self, path: str) -> str:
        return f"{self.sources.get(path, self.name)}: {path}" if path else self.name

    def check_keys(self, values: Any, known: tuple[str, ...], path: str) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{self(path)}: expected keys and values, got {values!r}", field=path)
        for key in values:
            if key not in known:
                below = f"{path}.{key}" if path else str(key)
                raise ConfigError(f"{self(below)}: unknown key {key!r}{nearest(str(key), known)}", field=str(key))


def _fields(cls: type) -> tuple[str, ...]:
    return tuple(spec.name for spec in dataclasses.fields(cls))


def _parse_stage(values: Any, path: str, where: _Where) -> StageConfig:
    where.check_keys(values, _fields(StageConfig), path)
    values = dict(values)
    if values.get("stage_type") == "llm":
        values["stage_type"] = "ar"
    for needed in ("stage_id", "stage_type"):
        if needed not in values:
            raise ConfigError(f"{where(path)}: {needed} is missing", field=needed)
    source = values.get("engine_input_source")
    if isinstance(source, int):
        values["engine_input_source"] = (source,)
    runtime = dict(values.get("runtime") or {})
    where.check_keys(runtime, _fields(StageRuntime), f"{path}.runtime")
    if isinstance(runtime.get("devices"), int):
        runtime["devices"] = str(runtime["devices"])
    for key in ("engine_args", "default_sampling_params", "input_connectors", "output_connectors"):
        if values.get(key, {}) is None:
            values[key] = {}
    values["runtime"] = parse(StageRuntime, runtime, where(f"{path}.runtime"))
    return parse(StageConfig, values, where(path))


def _parse_runtime(values: Any, where: _Where) -> RuntimeConfig:
    where.check_keys(values, _fields(RuntimeConfig), "runtime")
    defaults = values.get("defaults") or {}
    where.check_keys(defaults, _fields(RuntimeDefaults), "runtime.defaults")
    connectors = {}
    for name, item in (values.get("connectors") or {}).items():
        where.check_keys(item, _fields(ConnectorConfig), f"runtime.connectors.{name}")
        connectors[name] = parse(ConnectorConfig, item, where(f"runtime.connectors.{name}"))
    edges = []
    for index, item in enumerate(values.get("edges") or ()):
        path = f"runtime.edges[{index}]"
        where.check_keys(item, ("from", "to", "window_size"), path)
        renamed = {{"from": "from_stage", "to": "to_stage"}.get(key, key): value for key, value in item.items()}
        edges.append(parse(EdgeConfig, renamed, where(path)))
    checked = {
        **values,
        "defaults": parse(RuntimeDefaults, defaults, where("runtime.defaults")),
        "connectors": connectors,
        "edges": tuple(edges),
    }
    return parse(RuntimeConfig, checked, where("runtime"))


def single_diffusion_stage(engine_args: Mapping[str, Any], source: str) -> PipelineConfig:
    """The configuration of a model that is one diffusion stage."""
    values = {
        "stage_args": [
            {
                "stage_id": 0,
                "stage_type": "diffusion",
                "final_output": True,
                "final_output_type": "image",
                "engine_args": dict(engine_args),
            }
        ]
    }
    return parse_pipeline(values, {f"stage_args[0].engine_args.{name}": source for name in engine_args}, source)
