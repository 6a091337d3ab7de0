#!/usr/bin/env python3
"""Create ``.venv`` with the package, vLLM and the tools of development. Run by ``make install``; stdlib only.

Two things need care on a machine without an NVIDIA GPU, where vLLM's CPU wheel and the CPU build of torch are used:

* torch's CPU build comes from PyTorch's own index where that answers (it is asked with a short time-out), else from
  whatever pip is configured with (a folder of wheels, a mirror).
* torchvision, torchaudio and torchcodec on PyPI are CUDA builds. Against a CPU torch, torchaudio and torchcodec cannot
  be imported and are removed (nothing here needs them). torchvision is needed, but its import fails because its operator
  library does not load; a start-up file in the environment declares the two operator schemas that it looks up, just
  before its first import. It works in every process of the environment, spawned ones too.
"""

import argparse
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 3

SHIM = '''"""Declares torchvision's operator schemas when its own library cannot be loaded (CUDA build beside a CPU torch)."""
import importlib.abc
import sys


class _DeclareOps(importlib.abc.MetaPathFinder):
    """Sees the first import of torchvision, declares what it will look up, and steps aside."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DeclareOps.library = library  # kept alive: its schemas go when it does
        return None


sys.meta_path.insert(0, _DeclareOps())
'''


def run(*command: str | Path, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command; stop with its output when it fails."""
    result = subprocess.run([str(part) for part in command], text=True, capture_output=quiet)
    if result.returncode and not quiet:
        sys.exit(f"install: {' '.join(str(part) for part in command)} failed with status {result.returncode}")
    return result


def has_nvidia_gpu() -> bool:
    """Whether the driver's tool lists a GPU."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def cpu_index_answers() -> bool:
    """Whether PyTorch's CPU index can be reached, asked with a short time-out."""
    try:
        with urllib.request.urlopen(f"{TORCH_CPU_INDEX}/torch/", timeout=PROBE_SECONDS) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def imports(python: Path, module: str) -> bool:
    """Whether ``module`` imports in a fresh process of the environment."""
    return run(python, "-c", f"import {module}", quiet=True).returncode == 0


def mend_torch_companions(python: Path) -> None:
    """Make torchvision importable beside a CPU torch; remove the companions that cannot be."""
    for package in ("torchaudio", "torchcodec"):
        installed = run(python, "-m", "pip", "show", "-q", package, quiet=True).returncode == 0
        if installed and not imports(python, package):
            run(python, "-m", "pip", "uninstall", "-q", "-y", package)
    if imports(python, "torchvision"):
        return
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", quiet=True).stdout.strip())
    (site / "_torchvision_ops.py").write_text(SHIM)
    (site / "_torchvision_ops.pth").write_text("import _torchvision_ops\n")
    if not imports(python, "torchvision"):
        sys.exit("install: torchvision cannot be imported; see the message of: python -c 'import torchvision'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment goes (default .venv)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="which vLLM (default: by GPU)"
    )
    args = parser.parse_args()

    device = args.device if args.device != "auto" else ("cuda" if has_nvidia_gpu() else "cpu")
    python = args.venv / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", args.venv)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if device == "cpu":
        index = ["--extra-index-url", TORCH_CPU_INDEX] if cpu_index_answers() else []
        print("install: torch (CPU build)", flush=True)
        run(*pip, *index, TORCH)
    else:
        index = []
    print(f"install: vllm-omni[{device},test] and what it needs (minutes)", flush=True)
    run(*pip, *index, "-e", f"{ROOT}[{device},test]")
    if device == "cpu":
        mend_torch_companions(python)
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    version = subprocess.run([python, "-m", "vllm_omni", "--version"], env=env, text=True, capture_output=True)
    if version.returncode:
        sys.exit(f"install: the package does not start:\n{version.stderr}")
    print(f"install: {version.stdout.strip()} ({device}) in {args.venv}", flush=True)


if __name__ == "__main__":
    main()
