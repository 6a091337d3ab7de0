"""Sampling parameters of a request: one set per stage, from defaults, from what the caller gave, from loose
arguments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from vllm_omni.config.schema import nearest
from vllm_omni.config.stage import PipelineConfig, StageConfig
from vllm_omni.entrypoints.stage_arguments import runs_on_vllm
from vllm_omni.entrypoints.stage_graph import StageNode
from vllm_omni.errors import ConfigError, RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniSamplingParams
from vllm_omni.inputs.edge import ReadingEdge


def default_params(
    pipeline: PipelineConfig, read: Mapping[int, Collection[str]] = MappingProxyType({})
) -> dict[int, OmniSamplingParams]:
    """Each stage's own parameters; ``read``: ``read_params`` of the graph.

    Raises:
        ConfigError: ``default_sampling_params`` of a stage are wrong.
    """
    return {stage.stage_id: _default(stage, read.get(stage.stage_id)) for stage in pipeline.stages}


def _default(stage: StageConfig, read: Collection[str] | None) -> OmniSamplingParams:
    values = dict(stage.default_sampling_params)
    try:
        if stage.stage_type == "diffusion":
            params = OmniDiffusionSamplingParams.from_kwargs(values)
            params.validate()
            return params
        from vllm import SamplingParams

        with _vllms_errors():
            made = SamplingParams(**values)
        if read is not None:
            check_read(stage.stage_id, made, SamplingParams(), read, "default_sampling_params")
        return made
    except (RequestError, TypeError) as error:
        raise ConfigError(
            f"stage {stage.stage_id}: default_sampling_params: {error}", field="default_sampling_params"
        ) from error


def text_stages(pipeline: PipelineConfig) -> frozenset[int]:
    """The stages that one set of vLLM's parameters is meant for, of a graph with several stages on vLLM: what reads the
    prompt and writes the text. A talker has its own defaults: 64 tokens are a text, but not the speech of one."""
    on_vllm = [stage for stage in pipeline.stages if stage.stage_type == "ar"]
    chosen = [stage for stage in on_vllm if stage.is_comprehension]
    if not chosen:
        chosen = [stage for stage in on_vllm if stage.final_output and stage.final_output_type == "text"]
    return frozenset(stage.stage_id for stage in chosen)


def read_params(pipeline: PipelineConfig, nodes: Iterable[StageNode]) -> dict[int, frozenset[str]]:
    """By stage on vLLM that works in one pass: the fields of its ``SamplingParams`` that the edge to it reads. Without
    the stages whose edge does not say so."""
    edges = {node.stage_id: node.process_input for node in nodes}
    out = {}
    for stage in pipeline.stages:
        edge = edges[stage.stage_id]
        read = edge.params if isinstance(edge, ReadingEdge) else None
        if read is not None and stage.stage_type == "generation" and runs_on_vllm(stage):
            out[stage.stage_id] = read
    return out


_KEPT_BY_ANY = frozenset({"max_tokens", "seed", "output_kind", "detokenize", "skip_clone"})
"""What a stage that draws no tokens keeps to in any case: it makes no more than so many, and always the same."""


def check_read(stage_id: int, params: Any, default: Any, read: Collection[str], field: str) -> None:
    """Check the parameters of a stage that draws no tokens: what would change its output has to be read.

    Args:
        stage_id: the stage.
        params: vLLM's ``SamplingParams`` of a request.
        default: the stage's own, which pass.
        read: fields that are read.
        field: what the error names.

    Raises:
        RequestError: a value is neither the default nor without effect (``temperature=0`` asks for what it does).
    """
    plain = type(params)()
    for name in params.__struct_fields__:
        value = getattr(params, name)
        if name in read or name in _KEPT_BY_ANY or name.startswith("_") or (name == "temperature" and value == 0):
            continue
        if value != getattr(plain, name) and value != getattr(default, name):
            known = f"of what is set here it reads {' and '.join(sorted(read))}" if read else "it reads none of these"
            raise RequestError(
                f"sampling params of stage {stage_id}: {name}={value!r}: the stage draws no tokens; {known}",
                field=field,
                stage_id=stage_id,
                parameter=name,
                allowed=getattr(plain, name),
            )


def params_for(
    defaults: Mapping[int, OmniSamplingParams],
    given: OmniSamplingParams | Sequence[OmniSamplingParams] | None,
    loose: Mapping[str, Any] | None = None,
    text: Collection[int] = (),
    read: Mapping[int, Collection[str]] = MappingProxyType({}),
) -> dict[int, OmniSamplingParams]:
    """Parameters of every stage for one request.

    What ends a stage's output is the model's: ``stop_token_ids`` of a stage's defaults are added to those that are
    given, unless these have ``ignore_eos``.

    Args:
        defaults: each stage's own.
        given: one object replaces the defaults of every stage that has the same class (vLLM's: of the ``text`` stages,
            where there are any, else of those that draw tokens); a list has one per stage.
        loose: fields of ``OmniDiffusionSamplingParams`` that are set over that in every diffusion stage.
        text: ``text_stages`` of the graph.
        read: ``read_params`` of the graph.

    Raises:
        RequestError: a list of the wrong length, a wrong class, an unknown or bad field, or one that is not read by a
            stage that draws no tokens.
    """
    out = dict(defaults)
    if isinstance(given, (list, tuple)):
        if len(given) != len(defaults):
            raise RequestError(
                f"Expected {len(defaults)} sampling params, got {len(given)}", field="sampling_params_list"
            )
        for index, ((stage_id, default), params) in enumerate(zip(defaults.items(), given, strict=True)):
            if type(params) is not type(default):
                raise RequestError(
                    f"sampling params of stage {stage_id} are {type(params).__name__}; expected "
                    f"{type(default).__name__}",
                    field="sampling_params_list",
                )
            if stage_id in read:
                check_read(stage_id, params, default, read[stage_id], f"sampling_params_list.{index}")
            out[stage_id] = _with_ends(default, params)
    elif given is not None:
        same = [stage_id for stage_id, default in defaults.items() if type(default) is type(given)]
        if not same:
            allowed = sorted({type(default).__name__ for default in defaults.values()})
            raise RequestError(
                f"sampling params are {type(given).__name__}; expected {' or '.join(allowed)}", field="sampling_params"
            )
        if not isinstance(given, OmniDiffusionSamplingParams):
            same = [i for i in same if i in text] or [i for i in same if i not in read] or same
            for stage_id in read.keys() & same:
                check_read(stage_id, given, defaults[stage_id], read[stage_id], "sampling_params")
        out.update({stage_id: _with_ends(defaults[stage_id], given) for stage_id in same})
    if loose:
        _fold(out, loose)
    for params in out.values():
        if isinstance(params, OmniDiffusionSamplingParams):
            params.validate()
        else:
            _check(params)
    return out


def _check(params: Any) -> None:
    """vLLM checks parameters when they are made; this checks what was set since.

    Raises:
        RequestError: a value is wrong.
    """
    import msgspec

    with _vllms_errors():
        msgspec.structs.replace(params)


@contextmanager
def _vllms_errors() -> Iterator[None]:
    """What vLLM's ``SamplingParams`` refuse is a ``RequestError``."""
    from vllm.exceptions import VLLMValidationError

    try:
        yield
    except VLLMValidationError as error:
        raise RequestError(str(error.args[0]), field=error.parameter or "sampling_params") from error
    except (TypeError, ValueError) as error:
        raise RequestError(f"sampling params: {error}", field="sampling_params") from error


def _with_ends(default: Any, given: Any) -> OmniSamplingParams:
    """``given`` with the tokens that end the stage's output."""
    if isinstance(given, OmniDiffusionSamplingParams) or given is default:
        return given
    missing = set(default.stop_token_ids or ()).difference(given.stop_token_ids or ())
    if given.ignore_eos or not missing:
        return given
    import msgspec

    with _vllms_errors():
        return msgspec.structs.replace(given.clone(), stop_token_ids=[*(given.stop_token_ids or ()), *sorted(missing)])


def check_previews(params: Mapping[int, OmniSamplingParams], on_preview: Callable[..., None] | None) -> None:
    """Raises ``RequestError`` when previews are to be made that nobody would see."""
    if on_preview is not None:
        return
    for given in params.values():
        if isinstance(given, OmniDiffusionSamplingParams) and given.num_previews:
            raise RequestError("num_previews: needs on_preview, which is called with them", field="num_previews")


def whole_answers(params: Mapping[int, OmniSamplingParams]) -> dict[int, OmniSamplingParams]:
    """The same, with each text given once, when it is complete."""
    out = dict(params)
    for stage_id, given in params.items():
        if not isinstance(given, OmniDiffusionSamplingParams):
            from vllm.sampling_params import RequestOutputKind

            copy = given.clone()
            copy.output_kind = RequestOutputKind.FINAL_ONLY
            out[stage_id] = copy
    return out


def _fold(out: dict[int, OmniSamplingParams], loose: Mapping[str, Any]) -> None:
    known = {spec.name for spec in fields(OmniDiffusionSamplingParams)}
    folded = False
    for stage_id, params in out.items():
        if isinstance(params, OmniDiffusionSamplingParams):
            folded = True
            checked = OmniDiffusionSamplingParams.from_kwargs(loose)
            copy = params.clone()
            for name in loose:
                setattr(copy, name, getattr(checked, name))
            out[stage_id] = copy
    if not folded:
        name = next(iter(loose))
        hint = "" if name in known else nearest(name, known)
        raise RequestError(f"{name}: no stage takes it, there is no diffusion stage{hint}", field=name)


def each(given: Any, count: int, name: str) -> list[Any]:
    """``given`` for each of ``count`` prompts: a list with one each, or one for all.

    Raises:
        RequestError: a list of another length.
    """
    if not isinstance(given, (list, tuple)):
        return [given] * count
    if len(given) != count:
        raise RequestError(f"{len(given)} of {name} for {count} prompts", field=name)
    return list(given)


def with_negative(prompts: Sequence[Any], negative: str | Sequence[str | None] | None) -> Iterator[Any]:
    """``prompts`` with ``negative`` put into them: one text for all, or one (or None) each."""
    if negative is None:
        yield from prompts
        return
    each = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if len(each) != len(prompts):
        raise RequestError(f"{len(each)} negative_prompts for {len(prompts)} prompts", field="negative_prompts")
    for prompt, text in zip(prompts, each, strict=True):
        if text is None:
            yield prompt
        elif isinstance(prompt, str):
            yield {"prompt": prompt, "negative_prompt": text}
        elif isinstance(prompt, Mapping) and "negative_prompt" not in prompt:
            yield {**prompt, "negative_prompt": text}
        else:
            raise RequestError("negative_prompts beside a negative_prompt in the prompt", field="negative_prompts")
