"""Choose the attention backend of a layer."""

from __future__ import annotations

import torch

from vllm_omni import envs
from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend
from vllm_omni.diffusion.attention.backends.registry import backend_class
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import ConfigError
from vllm_omni.platforms import get_platform


def get_attn_backend(
    od_config: OmniDiffusionConfig | None, head_size: int, dtype: torch.dtype
) -> type[AttentionBackend]:
    """The backend for layers of ``head_size`` and ``dtype``.

    The configuration decides, then DIFFUSION_ATTENTION_BACKEND, then the platform's order of preference, of which the
    first that can run the layer is taken. Without a configuration (a layer used by itself) it is SDPA.

    Raises:
        ConfigError: a backend was asked for by name and cannot run the layer; says why.
    """
    if od_config is None:
        return backend_class("SDPA")
    device_type = od_config.device_type
    asked = od_config.attention_backend if od_config.attention_backend != "auto" else envs.DIFFUSION_ATTENTION_BACKEND()
    if asked and asked.lower() != "auto":
        backend = backend_class(asked)
        reason = backend.why_not(device_type, dtype, head_size)
        if reason is not None:
            raise ConfigError(f"attention_backend={asked}: {reason}", field="attention_backend")
        return backend
    candidates = [backend_class(name) for name in get_platform(device_type).attention_backends]
    return next(backend for backend in candidates if backend.why_not(device_type, dtype, head_size) is None)
