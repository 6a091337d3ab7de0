"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_omni.version import __version__

_SECRET = ("--api-key",)


def about(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Machine, versions, time and the command (without keys)."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["vllm-omni", *_redacted(sys.argv[1:] if arguments is None else arguments)]),
        "client_machine": {
            "cpus": os.cpu_count(),
            "cpu": _cpu_model(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "load_average": os.getloadavg()[0],
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "versions": {"vllm-omni": __version__, "python": platform.python_version()},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _redacted(words: Sequence[str]) -> list[str]:
    out: list[str] = []
    for word in words:
        name, equals, _ = word.partition("=")
        if out and out[-1] in _SECRET:
            out.append("...")
        elif name in _SECRET and equals:
            out.append(f"{name}=...")
        else:
            out.append(word)
    return out
