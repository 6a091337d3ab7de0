"""Checks of a stage graph as a whole: ids, sources, cycles, functions, connectors, flow control."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_omni.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_omni.config.stage import PipelineConfig, StageConfig


def check_graph(config: PipelineConfig, where: Callable[[str], str]) -> None:
    """Raises:
    ConfigError: names the place and what is wrong.
    """
    paths = {stage.stage_id: f"stage_args[{index}]" for index, stage in enumerate(config.stages)}
    _check_ids(config, where)
    for stage in config.stages:
        _check_stage(config, stage, paths[stage.stage_id], where)
    _check_cycles(config, paths, where)
    _check_ends(config, paths, where)
    for stage in config.stages:
        _check_connectors(config, stage, paths[stage.stage_id], where)
    _check_flow(config, where)


def _check_ids(config: PipelineConfig, where: Callable[[str], str]) -> None:
    seen: set[int] = set()
    for index, stage in enumerate(config.stages):
        path = f"stage_args[{index}].stage_id"
        if stage.stage_id in seen:
            raise ConfigError(f"{where(path)}: stage_id {stage.stage_id} stands twice", field="stage_id")
        if stage.stage_id < 0:
            raise ConfigError(f"{where(path)}: {stage.stage_id} is negative", field="stage_id")
        seen.add(stage.stage_id)


def _check_stage(config: PipelineConfig, stage: StageConfig, path: str, where: Callable[[str], str]) -> None:
    types = {other.stage_id: other.stage_type for other in config.stages}
    for source in stage.engine_input_source:
        if source not in types:
            raise ConfigError(
                f"{where(f'{path}.engine_input_source')}: there is no stage {source}; there are {sorted(types)}",
                field="engine_input_source",
            )
    sources = stage.engine_input_source
    if len(set(sources)) != len(sources):
        raise ConfigError(f"{where(f'{path}.engine_input_source')}: a stage stands twice", field="engine_input_source")
    mixed = any(types[source] != stage.stage_type for source in sources)
    if not stage.custom_process_input_func and (mixed or len(sources) > 1):
        why = "its source is of another type" if mixed else "it has several sources"
        raise ConfigError(
            f"{where(path)}: stage {stage.stage_id} needs custom_process_input_func, because {why}",
            field="custom_process_input_func",
        )
    if stage.custom_process_input_func and not sources:
        raise ConfigError(
            f"{where(f'{path}.custom_process_input_func')}: stage {stage.stage_id} gets the user's prompt as it is; "
            "name engine_input_source, or drop the function",
            field="custom_process_input_func",
        )
    if not stage.runtime.process:
        raise ConfigError(f"{where(f'{path}.runtime.process')}: a stage always has its own process", field="process")
    if stage.runtime.max_batch_size is not None and stage.runtime.max_batch_size < 1:
        raise ConfigError(f"{where(f'{path}.runtime.max_batch_size')}: must be at least 1", field="max_batch_size")
    if stage.is_comprehension and stage.stage_type != "ar":
        raise ConfigError(
            f"{where(f'{path}.is_comprehension')}: only an ar stage reads text, this is a {stage.stage_type} stage",
            field="is_comprehension",
        )


def _check_connectors(config: PipelineConfig, stage: StageConfig, path: str, where: Callable[[str], str]) -> None:
    by_id = {other.stage_id: other for other in config.stages}
    targets = [other.stage_id for other in config.stages if stage.stage_id in other.engine_input_source]
    for key, allowed, names in (
        ("output_connectors", {f"to_stage_{target}" for target in targets}, stage.output_connectors),
        ("input_connectors", {f"from_stage_{source}" for source in stage.engine_input_source}, stage.input_connectors),
    ):
        for edge, name in names.items():
            place = where(f"{path}.{key}.{edge}")
            if edge not in allowed:
                raise ConfigError(
                    f"{place}: stage {stage.stage_id} has no such edge; it has {', '.join(sorted(allowed)) or 'none'}",
                    field=key,
                )
            if name not in config.runtime.connectors:
                known = ", ".join(sorted(config.runtime.connectors)) or "none"
                raise ConfigError(f"{place}: no connector {name!r} in runtime.connectors; there are {known}", field=key)
    for source in stage.engine_input_source:
        ours = stage.input_connectors.get(f"from_stage_{source}")
        theirs = by_id[source].output_connectors.get(f"to_stage_{stage.stage_id}")
        if ours is not None and ours != theirs:
            raise ConfigError(
                f"{where(f'{path}.input_connectors.from_stage_{source}')}: {ours!r}, but stage {source} sends to "
                f"stage {stage.stage_id} over {theirs or 'the default connector'!r}",
                field="input_connectors",
            )


def _check_cycles(config: PipelineConfig, paths: dict[int, str], where: Callable[[str], str]) -> None:
    sources = {stage.stage_id: stage.engine_input_source for stage in config.stages}
    done: set[int] = set()

    def visit(stage_id: int, trail: tuple[int, ...]) -> None:
        if stage_id in trail:
            circle = " <- ".join(map(str, (*trail[trail.index(stage_id) :], stage_id)))
            raise ConfigError(
                f"{where(f'{paths[stage_id]}.engine_input_source')}: the stages form a circle: {circle}",
                field="engine_input_source",
            )
        if stage_id not in done:
            for source in sources[stage_id]:
                visit(source, (*trail, stage_id))
            done.add(stage_id)

    for stage_id in sources:
        visit(stage_id, ())


def _check_ends(config: PipelineConfig, paths: dict[int, str], where: Callable[[str], str]) -> None:
    used = {source for stage in config.stages for source in stage.engine_input_source}
    for stage in config.stages:
        if stage.stage_id not in used and not stage.final_output:
            raise ConfigError(
                f"{where(paths[stage.stage_id])}: the output of stage {stage.stage_id} goes nowhere; "
                "set final_output, or name it in another stage's engine_input_source",
                field="final_output",
            )


def _check_flow(config: PipelineConfig, where: Callable[[str], str]) -> None:
    runtime = config.runtime
    if not runtime.enabled:
        raise ConfigError(f"{where('runtime.enabled')}: stages always run as processes", field="enabled")
    edges = {(source, stage.stage_id) for stage in config.stages for source in stage.engine_input_source}
    windows = [("runtime.defaults.window_size", runtime.defaults.window_size)]
    for index, edge in enumerate(runtime.edges):
        if (edge.from_stage, edge.to_stage) not in edges:
            known = ", ".join(f"{a} -> {b}" for a, b in sorted(edges)) or "none"
            raise ConfigError(
                f"{where(f'runtime.edges[{index}]')}: no edge {edge.from_stage} -> {edge.to_stage}; there are {known}",
                field="edges",
            )
        windows.append((f"runtime.edges[{index}].window_size", edge.window_size))
    for path, window in windows:
        if window is not None and window != -1 and window < 1:
            raise ConfigError(f"{where(path)}: {window}: allowed are -1 (all) and 1 or more", field="window_size")
    inflight = runtime.defaults.max_inflight
    if inflight is not None and inflight < 1:
        raise ConfigError(f"{where('runtime.defaults.max_inflight')}: must be at least 1", field="max_inflight")
