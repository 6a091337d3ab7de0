"""LoRA on CPU: requests with and without an adapter in one step.

vLLM marks a token without an adapter by slot -1. Its kernels on GPUs leave such tokens out; its operations on CPUs
index with it and take the last slot. Here that slot exists and stays empty, so such tokens get nothing added.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

_RESERVED = -1
"""No adapter has this id."""


class _SpareSlotManager(LRUCacheLoRAModelManager):
    """Keeps the last slot empty."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora_index_to_id[-1] = _RESERVED

    def activate_adapter(self, lora_id: int) -> bool:
        """Put an adapter into a slot, in place of the one that was used least recently when the others are taken."""
        if lora_id not in self._active_adapters and len(self._active_adapters) >= self.lora_slots - 1:
            self._active_adapters.remove_oldest()
        done: bool = super().activate_adapter(lora_id)
        return done

    def remove_all_adapters(self) -> None:
        """Empty every slot."""
        super().remove_all_adapters()
        self.lora_index_to_id[-1] = _RESERVED


class CPULoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's manager of adapters with one more slot, which stays empty."""

    _manager_cls = _SpareSlotManager


def cpu_lora_manager(vllm_config: VllmConfig, device: torch.device, model: Any) -> CPULoRAManager:
    """The manager of a stage with ``max_loras`` adapters."""
    config = copy.copy(vllm_config)
    slots = config.lora_config.max_loras + 1
    config.lora_config = replace(
        config.lora_config, max_loras=slots, max_cpu_loras=config.lora_config.max_cpu_loras + 1
    )
    return CPULoRAManager(config, device, model.embedding_modules)


def fits_nothing(manager: Any, lora_id: int) -> bool:
    """Whether a loaded adapter has weights for none of the model's modules, and so would do nothing."""
    adapters = manager._adapter_manager
    adapter = adapters.get_adapter(lora_id)
    return not any(adapters._get_lora_layer_weights(adapter, name) for name in adapters.modules)
