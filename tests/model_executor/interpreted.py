"""Triton kernels on a CPU: in Triton's interpreter, in a process of its own, as the switch is read at the import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves are tested")


def interpret(program: str) -> None:
    """Run ``program``, which asserts, in ``torch.inference_mode``."""
    pytest.importorskip("triton")
    code = f"import torch\nwith torch.inference_mode():\n    {program.strip()}\nprint('equal')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("equal\n"), done.stderr
