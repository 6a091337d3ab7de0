"""Extension goes by seams: nothing writes into another module, and no error is swallowed."""

import ast
from collections.abc import Iterator

from tests.ratchets.source import Module, modules

# Module -> why it may catch every exception. Each is the main of a process and turns what it caught into a typed error.
CATCHES_ALL: dict[str, str] = {
    "vllm_omni.entrypoints.cli.main": "main of the command: one line on stderr and a status",
    "vllm_omni.engine.stage_process": "main of a stage's process: Failed, or Returned with a typed error",
    "vllm_omni.entrypoints.orchestrator": "edge functions are foreign code: what one raises ends its request, typed",
    "vllm_omni.diffusion.worker.diffusion_worker": "main of a rank's process: Failed, or a typed error of one unit",
}
# Module -> why it asks an object what it has.
PROBES: dict[str, str] = {}
WRITERS = ("setattr", "delattr")


def _imported(module: Module) -> set[str]:
    """Names that the module's imports bind, at any depth."""
    bound = set()
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return bound


def _root(node: ast.expr) -> str | None:
    """``a`` of ``a.b.c``; None for anything else than a chain of attributes and subscripts."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, (ast.Assign, ast.Delete)):
        return list(node.targets)
    if isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        return [node.target]
    return []


def _foreign_writes(module: Module) -> Iterator[str]:
    imported = _imported(module)
    for node in ast.walk(module.tree):
        for target in _targets(node):
            if isinstance(target, (ast.Attribute, ast.Subscript)) and _root(target) in imported:
                text = ast.unparse(target)
                if not text.startswith("os.environ["):
                    yield f"{module.at(node)}: writes {text}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in WRITERS and _root(node.args[0]) in imported:
            yield f"{module.at(node)}: {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.modules", "sys.meta_path"):
            yield f"{module.at(node)}: {ast.unparse(node)}"


def test_nothing_is_written_into_other_modules() -> None:
    wrong = [line for module in modules() for line in _foreign_writes(module)]
    assert not wrong, "\n".join(wrong)


def _broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)


def _reraises(handler: ast.ExceptHandler) -> bool:
    """Whether the handler ends in a bare ``raise``: clean-up on the way out swallows nothing."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def test_only_process_mains_catch_everything() -> None:
    found = [
        (module.name, module.at(node))
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ExceptHandler) and _broad(node) and not _reraises(node)
    ]
    wrong = [where for name, where in found if name not in CATCHES_ALL]
    assert not wrong, "catches every exception: " + ", ".join(wrong)
    stale = sorted(set(CATCHES_ALL) - {name for name, _ in found})
    assert not stale, f"no exception needed any more: {stale}"


def test_no_error_is_passed_over() -> None:
    """``except X: pass`` hides what happened; ``contextlib.suppress(X)`` says that it is meant."""
    wrong = [
        module.at(node)
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ExceptHandler) and all(isinstance(child, ast.Pass) for child in node.body)
    ]
    assert not wrong, "bare pass in: " + ", ".join(wrong)


def test_attributes_are_not_probed() -> None:
    """No ``hasattr`` and no ``getattr(x, "name", default)``: types say what an object has."""
    wrong = []
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                probes = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
                if probes and module.name not in PROBES:
                    wrong.append(f"{module.at(node)}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)
