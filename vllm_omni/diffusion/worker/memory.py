"""How much memory activations take, measured while requests run, and how many latent tokens that leaves room for.

Activation memory of a transformer with fused attention, and of a convolutional decoder, grows linearly with the latent
tokens of a unit. So one figure a kind of unit is enough: bytes per token, taken from the largest unit seen, where
constant parts weigh least. On a CPU nothing can be measured; there ``max_num_batched_tokens`` alone limits a unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

TRUSTED_REACH = 4


class MemoryMeter:
    """Measures units of one rank. All figures come from the allocator's counters: no synchronisation."""

    def __init__(self, od_config: OmniDiffusionConfig, device: torch.device) -> None:
        self._device = device
        self._configured = float(od_config.max_num_batched_tokens or math.inf)
        self._utilization = od_config.gpu_memory_utilization
        self._budget = math.inf
        self._largest: dict[str, tuple[int, int]] = {}

    def loaded(self) -> dict[str, float]:
        """Take stock after loading: what is left for activations. Returns and logs the plan in GiB (GPU only)."""
        if self._device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self._device)
        weights = torch.cuda.memory_allocated(self._device)
        others = total - free - torch.cuda.memory_reserved(self._device)
        self._budget = max(0.0, total * self._utilization - weights - others)
        gib = 2.0**30
        plan = {"total": total, "weights": weights, "others": others, "activations": self._budget}
        plan = {name: round(value / gib, 2) for name, value in plan.items()}
        logger.info(
            "memory plan of %s in GiB: has %.2f, weights %.2f, others %.2f, leaves %.2f for activations at "
            "gpu_memory_utilization=%s",
            *(self._device, plan["total"], plan["weights"], plan["others"], plan["activations"], self._utilization),
        )
        return plan

    @contextmanager
    def measure(self, kind: str, tokens: int) -> Iterator[None]:
        """Measure the peak of one unit of ``tokens`` latent tokens."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        self.record(kind, tokens, torch.cuda.max_memory_allocated(self._device) - before)

    def record(self, kind: str, tokens: int, peak: int) -> None:
        """Note that a unit of ``tokens`` latent tokens took ``peak`` bytes at most."""
        if tokens >= self._largest.get(kind, (0, 0))[0]:
            self._largest[kind] = (tokens, peak)

    def token_limit(self, kind: str) -> float:
        """Latent tokens that a unit of ``kind`` may have: what is configured, or less when memory says so."""
        tokens, peak = self._largest.get(kind, (0, 0))
        measured = self._budget * tokens / peak if peak > 0 else math.inf
        return min(self._configured, measured)

    def fit_limit(self) -> float:
        """Latent tokens of the largest request that can fit at all; larger ones are refused without trying.

        A small peak says little of a large request (constant parts weigh in), so only peaks of at least
        ``1 / TRUSTED_REACH`` of the memory count.
        """
        trusted = [kind for kind, (_, peak) in self._largest.items() if peak * TRUSTED_REACH >= self._budget]
        return min([self._configured, *(self.token_limit(kind) for kind in trusted)])
