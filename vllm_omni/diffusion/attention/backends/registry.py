"""Names of the attention backends."""

from __future__ import annotations

import importlib

from vllm_omni.config.schema import nearest
from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend
from vllm_omni.errors import ConfigError

_BACKENDS = {
    "SDPA": ("vllm_omni.diffusion.attention.backends.sdpa", "SDPABackend"),
    "FLASH_ATTN": ("vllm_omni.diffusion.attention.backends.flash_attn", "FlashAttnBackend"),
}


def backend_class(name: str) -> type[AttentionBackend]:
    """The backend called ``name``.

    Raises:
        ConfigError: no such backend.
    """
    if name not in _BACKENDS:
        raise ConfigError(f"attention_backend={name!r}{nearest(name, _BACKENDS)}", field="attention_backend")
    module, cls = _BACKENDS[name]
    found: type[AttentionBackend] = vars(importlib.import_module(module))[cls]
    return found
