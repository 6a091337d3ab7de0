"""Logging for the package.

Every module calls ``init_logger(__name__)``. Output goes to stderr, one line a record, with the process name, so that
lines of several stage processes can be told apart. The level comes from ``VLLM_LOGGING_LEVEL``, as in vLLM. Records of
vLLM's modules go the same way, until vLLM configures its own logging (in the processes of its engines).
"""

import logging
import sys

from vllm_omni import envs

_FORMAT = "%(levelname)s %(asctime)s [%(processName)s] %(name)s: %(request)s%(message)s"
"""``request`` is what a server's filter puts there; nothing elsewhere."""
_ROOT = "vllm_omni"
_VLLM = "vllm"


def _configure_root() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S", defaults={"request": ""}))
    for name in (_ROOT, _VLLM):
        root = logging.getLogger(name)
        if not root.handlers:
            root.addHandler(handler)
            root.setLevel(envs.VLLM_LOGGING_LEVEL())
            root.propagate = False


def init_logger(name: str) -> logging.Logger:
    """Return the logger of module ``name`` below the package's root logger."""
    _configure_root()
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")
