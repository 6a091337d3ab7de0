"""What the package needs at run time is in the wheel, and what its metadata says is true."""

import fnmatch
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from tests.ratchets.source import PACKAGE, ROOT, imports, modules
from vllm_omni.version import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Imported name -> distribution, where they differ; and what an extra brings.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "zmq": "pyzmq", "huggingface_hub": "transformers"}
FROM_EXTRAS = {"vllm", "flash_attn", "opentelemetry"}
# Imported only where another library of the list brings it.
BROUGHT_ALONG = {
    "packaging": "transformers",
    "tokenizers": "transformers",
    "typing_extensions": "pydantic",
    "triton": "torch",
}


def test_every_data_file_is_in_the_wheel() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["vllm_omni"]
    inside = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file()]
    data = [path for path in inside if path.suffix not in (".py", ".pyc")]
    assert Path("py.typed") in data

    def covered(path: Path) -> bool:
        return any(
            fnmatch.fnmatch(str(path), pattern) or fnmatch.fnmatch(f"x/{path}", pattern.replace("**/", "*/"))
            for pattern in patterns
        )

    assert [str(path) for path in data if not covered(path)] == []


def test_every_folder_of_the_package_is_a_package() -> None:
    """``packages.find`` leaves out a folder without ``__init__.py``."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_every_imported_library_is_a_dependency() -> None:
    import sys

    named = {Requirement(text).name.lower().replace("_", "-") for text in PROJECT["project"]["dependencies"]}
    wrong = []
    for module in modules():
        for node, name in imports(module):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in FROM_EXTRAS or top == "vllm_omni":
                continue
            if (
                BROUGHT_ALONG.get(DISTRIBUTIONS.get(top, top), DISTRIBUTIONS.get(top, top)).replace("_", "-")
                not in named
            ):
                wrong.append(f"{module.at(node)}: {top}")
    assert not wrong, "not in [project.dependencies]: " + ", ".join(wrong)


def test_version_is_written_once() -> None:
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vllm_omni.version.__version__"}
    assert __version__ in (ROOT / "CHANGELOG.md").read_text()


def test_license_is_the_whole_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
