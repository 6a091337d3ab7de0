"""The package's source as syntax trees, read once for all ratchets."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vllm_omni"


@dataclass(frozen=True)
class Module:
    """One module of the package."""

    name: str
    """Dotted name."""
    path: Path
    text: str
    tree: ast.Module

    def at(self, node: ast.AST) -> str:
        """``path:line`` of a node, for messages."""
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


@functools.cache
def modules() -> tuple[Module, ...]:
    """Every module of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text()
        found.append(Module(name, path, text, ast.parse(text)))
    assert found, "no module found"
    return tuple(found)


@functools.cache
def names() -> frozenset[str]:
    """Dotted names of every module."""
    return frozenset(module.name for module in modules())


def imports(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """Every module that ``module`` imports, at its top, inside functions and under TYPE_CHECKING alike.

    ``from package import name`` counts as ``package.name`` when that is a module.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.at(node)}: relative import; write the full name"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node, full if full in names() else base


def bound_names(module: Module) -> set[str]:
    """Names that the module's top level binds."""
    bound: set[str] = set()
    for node in module.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            bound |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            bound.add(node.target.id)
    return bound


def all_names(module: Module) -> set[str]:
    """The module's ``__all__``; empty when it has none."""
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    return set()
