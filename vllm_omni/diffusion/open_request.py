"""What a diffusion engine keeps of a request for its caller: times, steps, and what was done when."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class OpenRequest:
    """One request that has not been answered yet."""

    deadline: float | None
    seed: int | None
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0
    encoded: float = 0.0
    denoised: float = 0.0
    steps: int | None = None
    batch_sizes: set[int] = field(default_factory=set)
    spans: list[tuple[str, float, float, dict[str, Any]]] | None = None
    """Units of work that it was part of (name, begin, end, facts); None for requests that are not traced."""

    def metrics(self, now: float) -> dict[str, Any]:
        """Seconds of each phase (they add up to ``total_s``), the seed, the steps, the batch sizes seen."""
        metrics: dict[str, Any] = {"seed": self.seed, "num_inference_steps": self.steps}
        metrics |= {"queue_s": self.started - self.arrived, "total_s": now - self.arrived}
        if not self.encoded:  # ran whole, not by steps
            return metrics | {"run_s": now - self.started}
        return metrics | {
            "encode_s": self.encoded - self.started,
            "denoise_s": self.denoised - self.encoded,
            "decode_s": now - self.denoised,
            "batch_sizes": sorted(self.batch_sizes),
        }

    def note(self, unit: str, begun: float, ended: float, batch: int) -> None:
        """It was part of a unit of ``batch`` requests."""
        if self.spans is not None:
            facts = {"batch": batch}
            if unit == "denoise":
                facts["step"] = sum(name == unit for name, *_ in self.spans) + 1
                facts["of"] = self.steps or 0
            self.spans.append((unit, begun, ended, facts))

    def finish(self, now: float) -> list[tuple[str, float, float, dict[str, Any]]]:
        """Its spans; the last unit lasted until its output was on the host."""
        if not self.spans:
            return []
        name, begun, _, facts = self.spans.pop()
        return [*self.spans, (name, begun, now, facts)]
