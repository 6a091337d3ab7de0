#!/usr/bin/env python3
"""Create ``.venv`` with the package, vLLM and the tools of development. Run by ``make install``; stdlib only.

``--serving`` leaves the tools of development out, and ``--only-dependencies`` the package itself: a container's layer
of dependencies can then be made before the package is there, and stays when the package changes.

Two things need care on a machine without an NVIDIA GPU, where vLLM's CPU wheel and the CPU build of torch are used:

* torch's CPU build comes from PyTorch's own index where that answers (it is asked with a short time-out), else from
  whatever pip is configured with (a folder of wheels, a mirror).
* torchvision, torchaudio and torchcodec on PyPI are CUDA builds. Against a CPU torch, torchaudio and torchcodec cannot
  be imported and are removed (nothing here needs them). torchvision is needed, but its import fails because its
  operator library does not load; a start-up file in the environment declares the two operator schemas that it looks
  up, just before its first import. It works in every process of the environment, spawned ones too.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 3
LINES_KEPT = 40
"""Lines of pip's output that are shown when it fails."""

SHIM = '''"""Declares the operator schemas of a torchvision whose library cannot be loaded (CUDA build, CPU torch)."""
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


def say(text: str) -> None:
    """One line of progress."""
    print(f"install: {text}", flush=True)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it prints; the caller looks at its status."""
    return subprocess.run([str(part) for part in command], text=True, capture_output=True)


def pip_install(python: Path, title: str, *arguments: str) -> None:
    """Run ``pip install`` with one line of progress in place of pip's many; stop with their end when it fails."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off", *arguments]
    live = sys.stdout.isatty()
    started, found = time.monotonic(), 0
    say(f"{title} ...")
    output: list[str] = []
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            what = re.match(r"(Collecting|Installing collected packages|Building) ?(\S*)", line.strip())
            if not what:
                continue
            found += what[1] == "Collecting"
            text = f"{found} packages found, now {what[2]}" if what[1] == "Collecting" else what[1].lower()
            if live:
                print(f"\r\033[K  {text[:100]}", end="", flush=True)
            elif what[1] == "Installing collected packages" or (found and found % 50 == 0):
                print(f"  {time.monotonic() - started:4.0f} s  {text}", flush=True)
    if live:
        print("\r\033[K", end="", flush=True)
    if process.returncode:
        sys.exit("".join(output[-LINES_KEPT:]) + f"install: pip failed with status {process.returncode}")
    say(f"{title}: {time.monotonic() - started:.0f} s")


def has_nvidia_gpu() -> bool:
    """Whether the driver's tool lists a GPU."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and run(tool, "-L").returncode == 0


def cpu_index_answers() -> bool:
    """Whether PyTorch's CPU index can be reached, asked with a short time-out."""
    try:
        with urllib.request.urlopen(f"{TORCH_CPU_INDEX}/torch/", timeout=PROBE_SECONDS) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def dependencies(*extras: str) -> list[str]:
    """What ``pyproject.toml`` names for the package with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + [name for extra in extras for name in project["optional-dependencies"][extra]]


def imports(python: Path, module: str) -> bool:
    """Whether ``module`` imports in a fresh process of the environment."""
    return run(python, "-c", f"import {module}").returncode == 0


def mend_torch_companions(python: Path) -> None:
    """Make torchvision importable beside a CPU torch; remove the companions that cannot be."""
    for package in ("torchaudio", "torchcodec"):
        installed = run(python, "-m", "pip", "show", "-q", package).returncode == 0
        if installed and not imports(python, package):
            run(python, "-m", "pip", "uninstall", "-q", "-y", package)
            say(f"removed {package} (a CUDA build, which this torch cannot load; nothing here needs it)")
    if imports(python, "torchvision"):
        return
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    (site / "_torchvision_ops.py").write_text(SHIM)
    (site / "_torchvision_ops.pth").write_text("import _torchvision_ops\n")
    if not imports(python, "torchvision"):
        sys.exit("install: torchvision cannot be imported:\n" + run(python, "-c", "import torchvision").stderr)
    say("declared torchvision's operators (a CUDA build beside a CPU torch)")


def make_environment(venv: Path) -> Path:
    """Create the environment where it is not there yet; returns its interpreter."""
    python = venv / "bin" / "python"
    if not (python.exists() and imports(python, "pip")):
        made = run(sys.executable, "-m", "venv", "--clear", venv)
        if made.returncode:
            sys.exit(f"install: {sys.executable} -m venv {venv} failed:\n{made.stdout}{made.stderr}")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment goes (default .venv)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="which vLLM (default: by GPU)"
    )
    parser.add_argument("--serving", action="store_true", help="only what a server needs, no tools of development")
    parser.add_argument("--only-dependencies", action="store_true", help="what the package needs, but not itself")
    args = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 (an older interpreter shall say so)
        sys.exit(f"install: Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}")

    device = args.device if args.device != "auto" else ("cuda" if has_nvidia_gpu() else "cpu")
    python = make_environment(args.venv)
    index: list[str] = []
    if device == "cpu":
        index = ["--extra-index-url", TORCH_CPU_INDEX] if cpu_index_answers() else []
        pip_install(python, "torch (CPU build)", *index, TORCH)
    extras = (device, "media" if args.serving else "test")
    name = f"vllm-omni[{','.join(extras)}]"
    if args.only_dependencies:
        pip_install(python, f"what {name} needs", *index, *dependencies(*extras))
    else:
        pip_install(python, f"{name} and what it needs", *index, "-e", f"{ROOT}[{','.join(extras)}]")
    if device == "cpu":
        mend_torch_companions(python)
    if args.only_dependencies:
        return

    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    version = subprocess.run([args.venv / "bin" / "vllm-omni", "--version"], env=env, text=True, capture_output=True)
    if version.returncode:
        sys.exit(f"install: the package does not start:\n{version.stderr}")
    say(f"{version.stdout.strip()} ({device}) in {args.venv}")


if __name__ == "__main__":
    main()
