"""Every environment variable that the package reads, in one table.

Each is a function that reads the variable when called, so that a test or a parent process can set it late.
``vllm-omni config show --env`` prints this table.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vllm_omni.errors import ConfigError

T = TypeVar("T")

REGISTRY: dict[str, "EnvVar[object]"] = {}


@dataclass(frozen=True)
class EnvVar(Generic[T]):
    """One variable: its name, how its text is parsed, its default and what it does. Calling it reads it."""

    name: str
    parse: Callable[[str], T]
    default: T
    help: str
    secret: bool = False
    """Whether its value must not be shown."""

    def __call__(self) -> T:
        """Raises:
        ConfigError: the variable is set to a text that cannot be parsed.
        """
        text = os.environ.get(self.name, "")
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ConfigError(f"environment variable {self.name}={text!r}: {error}", field=self.name) from error


def _register(var: EnvVar[T]) -> EnvVar[T]:
    REGISTRY[var.name] = var  # type: ignore[assignment]
    return var


def _level(text: str) -> str:
    allowed = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    if text.upper() not in allowed:
        raise ValueError(f"allowed are {', '.join(allowed)}")
    return text.upper()


VLLM_LOGGING_LEVEL = _register(EnvVar("VLLM_LOGGING_LEVEL", _level, "INFO", "Log level of vLLM and of this package."))
VLLM_API_KEY = _register(
    EnvVar("VLLM_API_KEY", str, None, "Key that requests to the HTTP server must bring (never printed).", secret=True)
)
VLLM_TORCH_PROFILER_DIR = _register(
    EnvVar("VLLM_TORCH_PROFILER_DIR", str, "./profiles", "Folder for the traces that start_profile/stop_profile write.")
)
DIFFUSION_ATTENTION_BACKEND = _register(
    EnvVar(
        "DIFFUSION_ATTENTION_BACKEND",
        str.upper,
        "",
        "Attention backend of diffusion stages (SDPA, FLASH_ATTN); empty lets the platform choose.",
    )
)


def _device_list(text: str) -> list[str] | None:
    return [name.strip() for name in text.split(",") if name.strip() not in ("", "-1")]


CUDA_VISIBLE_DEVICES = _register(
    EnvVar(
        "CUDA_VISIBLE_DEVICES",
        _device_list,
        None,
        "GPUs that may be used (indices or UUIDs); the devices of a stage count within this list.",
    )
)
CUDA_MPS_PIPE_DIRECTORY = _register(
    EnvVar(
        "CUDA_MPS_PIPE_DIRECTORY",
        str,
        None,
        "Where processes find an MPS daemon that runs already; gpu_sharing=mps then uses that one and starts none.",
    )
)
