"""Files, functions and dataclasses stay small enough to be read at one sitting."""

import ast

from tests.ratchets.source import Module, modules

FILE_LINES = 400
FUNCTION_LINES = 60
DATACLASS_FIELDS = 25

# What may be longer, and why.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
LARGE_DATACLASSES: dict[str, str] = {}


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _long_files() -> dict[str, str]:
    return {
        module.name: f"{module.path}: {lines} lines"
        for module in modules()
        if (lines := module.text.count("\n")) > FILE_LINES
    }


def _functions(module: Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(module.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def _long_functions() -> dict[str, str]:
    return {
        f"{module.name}.{node.name}": f"{module.at(node)}: {node.name} has {length} lines"
        for module in modules()
        for node in _functions(module)
        if (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    }


def _large_dataclasses() -> dict[str, str]:
    found = {}
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and _is_dataclass(node):
                count = sum(isinstance(child, ast.AnnAssign) for child in node.body)
                if count > DATACLASS_FIELDS:
                    found[f"{module.name}.{node.name}"] = f"{module.at(node)}: {node.name} has {count} fields"
    return found


def _check(found: dict[str, str], allowed: dict[str, str]) -> None:
    wrong = [text for name, text in found.items() if name not in allowed]
    assert not wrong, "\n".join(wrong)
    stale = sorted(set(allowed) - set(found))
    assert not stale, f"no exception needed any more: {stale}"


def test_files() -> None:
    _check(_long_files(), LONG_FILES)


def test_functions() -> None:
    _check(_long_functions(), LONG_FUNCTIONS)


def test_dataclasses() -> None:
    _check(_large_dataclasses(), LARGE_DATACLASSES)
