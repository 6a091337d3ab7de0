"""Every setting is documented, reachable from the command line, and an unknown one is an error that helps."""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ratchets.source import PACKAGE, modules
from vllm_omni import envs
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.entrypoints.cli.groups import ENGINE, OMNI, PARALLEL, SAMPLING
from vllm_omni.errors import ConfigError, OmniError, RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

# Modules whose dataclasses are set by users, or returned to them.
DOCUMENTED = (
    "vllm_omni.config",
    "vllm_omni.diffusion.data",
    "vllm_omni.diffusion.registry",
    "vllm_omni.diffusion.request",
    "vllm_omni.inputs",
    "vllm_omni.outputs",
)
# Module -> why it touches the environment beside the table in envs.py.
ENVIRONMENT: dict[str, str] = {
    "vllm_omni.envs": "the table",
    "vllm_omni.diffusion.distributed.parallel_state": "keeps vLLM's CPU ranks off named shared memory",
    "vllm_omni.distributed.runtime_directory": "where vLLM makes its sockets, and what the children of an engine get",
    "vllm_omni.engine.vllm_env": "what vLLM must find set in the processes that it starts",
    "vllm_omni.entrypoints.cli.generate": "a quieter log by default, for the stages too",
    "vllm_omni.diffusion.worker.diffusion_worker": "tells gloo which interface to listen on",
    "vllm_omni.entrypoints.cli.terminal": "what the terminal says of itself (TERM, COLORTERM, ...)",
}


def _documented_dataclasses() -> list[tuple[str, ast.ClassDef]]:
    return [
        (f"{module.name}.{node.name}", node)
        for module in modules()
        if any(module.name == prefix or module.name.startswith(prefix + ".") for prefix in DOCUMENTED)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list)
    ]


def test_every_field_has_a_docstring() -> None:
    classes = _documented_dataclasses()
    assert len(classes) >= 5
    wrong = []
    for name, node in classes:
        for child, after in zip(node.body, [*node.body[1:], None], strict=True):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(child, ast.AnnAssign) and not is_text:
                wrong.append(f"{name}.{ast.unparse(child.target)}")
    assert not wrong, "fields without a docstring: " + ", ".join(wrong)


def test_generate_has_an_option_for_every_field() -> None:
    from vllm_omni.entrypoints.cli.generate import COMMAND

    options = set(inspect.signature(COMMAND).parameters)
    for group in (OMNI, SAMPLING, ENGINE, PARALLEL):
        missing = {name for name in group.cls.__dataclass_fields__ if name not in group.skip} - options
        assert not missing, f"{group.cls.__name__}: no option for {sorted(missing)}"


@pytest.mark.parametrize(
    ("build", "values", "error", "hint"),
    [
        (OmniDiffusionConfig.from_kwargs, {"model": "m", "dytpe": "float32"}, ConfigError, "dtype"),
        (OmniDiffusionConfig.from_kwargs, {"model": "m", "cfg_parallel_sise": 2}, ConfigError, "cfg_parallel_size"),
        (lambda **kw: DiffusionParallelConfig.from_dict(kw), {"ulises_degree": 2}, ConfigError, "ulysses_degree"),
        (lambda **kw: OmniDiffusionSamplingParams.from_kwargs(kw), {"hieght": 64}, RequestError, "height"),
    ],
)
def test_an_unknown_key_names_the_nearest(
    build: Callable[..., Any], values: dict[str, Any], error: type[OmniError], hint: str
) -> None:
    with pytest.raises(error, match=f"did you mean '?{hint}"):
        build(**values)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_stage_configuration_of_the_package_parses(path: Path) -> None:
    from vllm_omni.config.stage import load_stage_configs

    assert load_stage_configs(path)


def test_environment_variables_are_read_in_one_place() -> None:
    found = {
        module.name: module.at(node)
        for module in modules()
        for node in ast.walk(module.tree)
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"))
    }
    wrong = [where for name, where in found.items() if name not in ENVIRONMENT]
    assert not wrong, "reads or writes the environment: " + ", ".join(wrong)
    stale = sorted(set(ENVIRONMENT) - set(found))
    assert not stale, f"no exception needed any more: {stale}"


def test_every_environment_variable_says_what_it_does() -> None:
    for name, variable in envs.REGISTRY.items():
        assert name == variable.name == name.upper()
        assert len(variable.help) > 10
