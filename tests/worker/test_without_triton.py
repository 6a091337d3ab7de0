"""Triton comes with the libraries for GPUs; a CPU does without."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import vllm_omni

for module in pkgutil.walk_packages(vllm_omni.__path__, "vllm_omni."):
    try:
        importlib.import_module(module.name) if not module.name.endswith("__main__") else None
    except ImportError as error:
        if "triton" in str(error):
            print("needs triton:", module.name)
"""


def test_only_kernels_need_triton() -> None:
    """Every other module imports without it: kernels are imported where they are used, on a GPU."""
    package = ROOT / "vllm_omni"
    own = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in package.rglob("*.py")
        if "\nimport triton\n" in path.read_text(encoding="utf-8")
    }
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = {line.removeprefix("needs triton: ") for line in done.stdout.splitlines() if line.startswith("needs")}
    assert found == own
    assert len(own) >= 5, "or the search is wrong"
