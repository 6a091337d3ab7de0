"""A module imports only from its own layer or below; the two sides of the engine never import each other."""

import ast

from tests.ratchets.source import imports, modules

# (layer, prefix): the longest prefix that fits a module decides. The layers are those of docs/design/architecture.md;
# the diffusion side's own order inside layer 3 stands behind the point.
LAYERS: tuple[tuple[float, str], ...] = (
    (0, "vllm_omni.version"),
    (0, "vllm_omni.errors"),
    (0, "vllm_omni.envs"),
    (0, "vllm_omni.lazy"),
    (0, "vllm_omni.logger"),
    (0, "vllm_omni.process"),
    (0, "vllm_omni.pulse"),
    (1, "vllm_omni.inputs"),
    (1, "vllm_omni.outputs"),
    (1, "vllm_omni.request"),
    (1, "vllm_omni.config"),
    (1, "vllm_omni.platforms"),
    (2, "vllm_omni.distributed"),
    (3.0, "vllm_omni.diffusion"),
    (3.1, "vllm_omni.diffusion.distributed"),
    (3.2, "vllm_omni.diffusion.attention"),
    (3.3, "vllm_omni.diffusion.layers"),
    (3.4, "vllm_omni.diffusion.hooks"),
    (3.4, "vllm_omni.diffusion.cache"),
    (3.4, "vllm_omni.diffusion.lora"),
    (3.5, "vllm_omni.diffusion.models.common"),
    (3.5, "vllm_omni.diffusion.models.interface"),
    (3.5, "vllm_omni.diffusion.models.schedulers"),
    (3.6, "vllm_omni.diffusion.models"),
    (3.7, "vllm_omni.diffusion.model_loader"),
    (3.7, "vllm_omni.diffusion.tiny_models"),
    (3.7, "vllm_omni.diffusion.compile"),
    (3.7, "vllm_omni.diffusion.offload"),
    (3, "vllm_omni.model_executor"),
    (4, "vllm_omni.worker"),
    (4, "vllm_omni.core"),
    (4, "vllm_omni.diffusion.worker"),
    (4, "vllm_omni.diffusion.profiler"),
    (5, "vllm_omni.diffusion.executor"),
    (5, "vllm_omni.diffusion.scheduler"),
    (5, "vllm_omni.diffusion.diffusion_engine"),
    (5, "vllm_omni.engine"),
    (6, "vllm_omni.entrypoints"),
    (7, "vllm_omni.entrypoints.cli"),
    (7, "vllm_omni.entrypoints.openai"),
    (7, "vllm_omni.benchmarks"),
    (7, "vllm_omni.__main__"),
)
AR_SIDE = ("vllm_omni.model_executor", "vllm_omni.worker", "vllm_omni.core", "vllm_omni.engine.ar")
DIFFUSION_SIDE = ("vllm_omni.diffusion",)

# (importer, imported): why it is allowed.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("vllm_omni", "vllm_omni.config.model"): "public names of the package, under TYPE_CHECKING; loaded lazily",
    ("vllm_omni", "vllm_omni.entrypoints.async_omni"): "as above",
    ("vllm_omni", "vllm_omni.entrypoints.omni"): "as above",
    ("vllm_omni", "vllm_omni.inputs.data"): "as above",
    ("vllm_omni", "vllm_omni.outputs"): "as above",
}


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer_of(name: str) -> float:
    """Layer of a module of the package."""
    if name == "vllm_omni":
        return 0
    fitting = [(len(prefix), layer) for layer, prefix in LAYERS if _under(name, prefix)]
    assert fitting, f"{name} has no layer: give it a row in LAYERS"
    return max(fitting)[1]


def _edges() -> list[tuple[str, str, str]]:
    found = []
    for module in modules():
        for node, imported in imports(module):
            if _under(imported, "vllm_omni") and imported != "vllm_omni":
                found.append((module.name, imported, module.at(node)))
    return found


def test_no_module_imports_from_above() -> None:
    wrong = [
        f"{where}: {importer} (layer {layer_of(importer)}) imports {imported} (layer {layer_of(imported)})"
        for importer, imported, where in _edges()
        if layer_of(imported) > layer_of(importer) and (importer, imported) not in EXCEPTIONS
    ]
    assert not wrong, "\n".join(wrong)


def test_ar_and_diffusion_meet_at_the_entrypoints_only() -> None:
    def side(name: str) -> str | None:
        if any(_under(name, prefix) for prefix in AR_SIDE):
            return "ar"
        return "diffusion" if any(_under(name, prefix) for prefix in DIFFUSION_SIDE) else None

    wrong = [
        f"{where}: {importer} imports {imported}"
        for importer, imported, where in _edges()
        if side(importer) and side(imported) and side(importer) != side(imported)
    ]
    assert not wrong, "\n".join(wrong)


def test_shared_model_parts_know_no_family() -> None:
    """Neither ``models/common`` nor the layers below it, nor one family another (edit variants share a folder)."""

    def family(name: str) -> str | None:
        parts = name.split(".")
        inside = parts[:3] == ["vllm_omni", "diffusion", "models"] and len(parts) > 3
        return parts[3] if inside and parts[3] not in ("common", "interface", "schedulers") else None

    wrong = [
        f"{where}: {importer} imports {imported}"
        for importer, imported, where in _edges()
        if family(imported) and layer_of(importer) < 3.7 and family(importer) != family(imported)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_still_needed() -> None:
    edges = {(importer, imported) for importer, imported, _ in _edges()}
    stale = [pair for pair in EXCEPTIONS if pair not in edges]
    assert not stale, f"remove from EXCEPTIONS: {stale}"


def test_importing_the_package_costs_nothing() -> None:
    """``import vllm_omni`` runs no import of another library: everything else is lazy."""
    package = next(module for module in modules() if module.name == "vllm_omni")
    top = {alias.name for node in package.tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module or "" for node in package.tree.body if isinstance(node, ast.ImportFrom)}
    assert top <= {"typing", "vllm_omni.lazy", "vllm_omni.version"}
