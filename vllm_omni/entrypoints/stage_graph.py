"""The stage graph as the orchestrator uses it: nodes with their edges resolved."""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_omni.config.stage import PipelineConfig, StageConfig
from vllm_omni.engine.messages import Edge
from vllm_omni.entrypoints.stage_arguments import runs_on_vllm
from vllm_omni.errors import ConfigError, RequestError
from vllm_omni.inputs.edge import EdgeFunction, pass_on


@dataclass(frozen=True)
class StageNode:
    """One stage: where its input comes from and where its output goes."""

    stage_id: int
    sources: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    final_output: bool = False
    final_output_type: str = "text"
    process_input: EdgeFunction = pass_on
    windows: dict[int, int] = field(default_factory=dict)
    """By source: how many of its outputs are handed over together; -1 means all at its end."""
    max_inflight: int | None = None
    """Requests that may be in the stage at once; more wait in the driver."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Settings for ``process_input``: ``extra`` of the connectors that feed the stage."""
    config: Any = None
    """The checkpoint's configuration, for ``process_input``."""
    direct_target: int | None = None
    """The stage whose process may get the outputs straight from this one's."""


class StageGraph:
    """A checked DAG of stages. Immutable."""

    def __init__(self, nodes: Sequence[StageNode]) -> None:
        self.nodes = tuple(nodes)
        self.roots = tuple(node for node in nodes if not node.sources)
        self._by_id = {node.stage_id: node for node in nodes}
        self._needed = functools.cache(self._compute_needed)

    @classmethod
    def from_config(cls, config: PipelineConfig) -> StageGraph:
        """Resolve functions and edges.

        Raises:
            ConfigError: a function cannot be imported.
        """
        targets: dict[int, list[int]] = {stage.stage_id: [] for stage in config.stages}
        for stage in config.stages:
            for source in stage.engine_input_source:
                targets[source].append(stage.stage_id)
        checkpoints = _checkpoint_configs(config)
        nodes = [
            _node(config, stage, tuple(targets[stage.stage_id]), checkpoints.get(stage.engine_args.get("model")))
            for stage in config.stages
        ]
        given = {node.stage_id: node.config for node in nodes}  # no direct edge's function gets a checkpoint's
        direct = {edge.source: target for target, edge in direct_edges(config).items() if given[target] is None}
        return cls([replace(node, direct_target=direct.get(node.stage_id)) for node in nodes])

    def node(self, stage_id: int) -> StageNode:
        """The node of a stage."""
        return self._by_id[stage_id]

    def needed(self, modalities: Sequence[str] | None) -> frozenset[int]:
        """The stages that have to run for these kinds of output: the final ones that make them, and all before those.

        Raises:
            RequestError: no stage makes one of them.
        """
        if isinstance(modalities, str):
            raise RequestError(
                f'output_modalities={modalities!r}: expected a list, such as ["{modalities}"]',
                field="output_modalities",
                value=modalities,
            )
        return self._needed(None if modalities is None else tuple(modalities))

    def wanted(self, node: StageNode, modalities: Sequence[str] | None) -> bool:
        """Whether the caller wants this final stage's output."""
        return modalities is None or node.final_output_type in modalities

    def _compute_needed(self, modalities: tuple[str, ...] | None) -> frozenset[int]:
        finals = [node for node in self.nodes if node.final_output]
        known = sorted({node.final_output_type for node in finals})
        for modality in modalities or ():
            if modality not in known:
                raise RequestError(
                    f"output_modalities: no stage makes {modality!r}; the model makes {', '.join(known)}",
                    field="output_modalities",
                    value=modality,
                    allowed=known,
                )
        if modalities is not None and not modalities:
            raise RequestError(f"output_modalities is empty; allowed are {', '.join(known)}", field="output_modalities")
        todo = [node.stage_id for node in finals if self.wanted(node, modalities)]
        needed: set[int] = set()
        while todo:
            stage_id = todo.pop()
            if stage_id not in needed:
                needed.add(stage_id)
                todo.extend(self._by_id[stage_id].sources)
        return frozenset(needed)


def direct_edges(config: PipelineConfig) -> dict[int, Edge]:
    """By target: the streamed edges whose chunks may go straight from process to process.

    Both stages run in processes of this package (vLLM's engines take input from one client alone), neither end has
    another edge there, nobody but the target gets the source's outputs, and the driver need not hold requests back.
    """
    readers = Counter(source for stage in config.stages for source in stage.engine_input_source)
    by_id = {stage.stage_id: stage for stage in config.stages}
    found = {}
    for stage in config.stages:
        if len(stage.engine_input_source) != 1 or config.runtime.defaults.max_inflight is not None:
            continue
        source = by_id[stage.engine_input_source[0]]
        window = config.window(source.stage_id, stage.stage_id)
        alone = readers[source.stage_id] == 1 and not source.final_output
        if window > 0 and alone and not runs_on_vllm(stage) and not runs_on_vllm(source):
            extra = _extra(config, stage)
            found[stage.stage_id] = Edge(source.stage_id, stage.custom_process_input_func, window, extra)
    return found


def _extra(config: PipelineConfig, stage: StageConfig) -> dict[str, Any]:
    """Settings of the connectors that feed a stage."""
    feeding = [config.connector(source, stage.stage_id) for source in stage.engine_input_source]
    return {key: value for connector in feeding if connector is not None for key, value in connector.extra.items()}


def _checkpoint_configs(config: PipelineConfig) -> dict[Any, Any]:
    """What transformers reads of each checkpoint that more than one stage on vLLM is a part of."""
    on_vllm = [stage for stage in config.stages if runs_on_vllm(stage)]
    if len(on_vllm) < 2:
        return {}
    from vllm.transformers_utils.config import get_config

    from vllm_omni.engine.vllm_errors import as_config_errors

    models = {(s.engine_args["model"], bool(s.engine_args.get("trust_remote_code"))) for s in on_vllm}
    configs = {}
    for model, trust in models:
        with as_config_errors(f"model={model!r}", "model"):
            configs[model] = get_config(model, trust_remote_code=trust)
    return configs


def _node(config: PipelineConfig, stage: StageConfig, targets: tuple[int, ...], checkpoint: Any) -> StageNode:
    return StageNode(
        stage_id=stage.stage_id,
        sources=stage.engine_input_source,
        targets=targets,
        final_output=stage.final_output,
        final_output_type=stage.final_output_type,
        process_input=_function(stage.custom_process_input_func) if stage.custom_process_input_func else pass_on,
        windows={source: config.window(source, stage.stage_id) for source in stage.engine_input_source},
        max_inflight=config.runtime.defaults.max_inflight,
        extra=_extra(config, stage),
        config=checkpoint,
    )


def _function(name: str) -> EdgeFunction:
    module, _, attribute = name.rpartition(".")
    try:
        function: EdgeFunction = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"custom_process_input_func: cannot load {name!r}: {error}", field="custom_process_input_func"
        ) from error
    if not callable(function):
        raise ConfigError(f"custom_process_input_func: {name!r} is no function", field="custom_process_input_func")
    return function
