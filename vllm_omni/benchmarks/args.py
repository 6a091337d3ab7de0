"""What ``vllm-omni bench serve`` is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_omni.errors import ConfigError

WorkloadName = Literal["small", "t2i", "mixed", "tts", "omni"]
SLO_NAMES = ("e2e", "ttft", "tpot", "ttfp", "rtf", "underrun")
"""Measures that an objective may bound; see ``measure.Measured``."""


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    """Settings of a load test."""

    base_url: str = "http://127.0.0.1:8000"
    """The server."""
    api_key: str | None = None
    """Key for the server; the environment variable VLLM_API_KEY says the same."""
    model: str | None = None
    """Name of the model in requests; default: the first that the server lists."""
    workload: WorkloadName = "small"
    """Requests: ``small`` (short ones of whatever kind the model makes, at its own settings), ``t2i`` (pictures of one
    shape), ``mixed`` (pictures of four sizes in a fixed order), ``tts`` (speech, streamed), ``omni`` (chats, streamed,
    with speech where the model makes it)."""
    concurrency: Sequence[float] | None = None
    """Closed loop: so many requests are open at any time; several numbers are measured one after another."""
    request_rate: Sequence[float] | None = None
    """Open loop: requests a second, at random (Poisson) times; several numbers are measured one after another."""
    num_requests: int | None = None
    """Requests of each measurement; default: 5 for each place of a closed loop, or what comes in ``duration``."""
    duration: float | None = None
    """Seconds in which requests are sent; those that are open then are waited for."""
    warmup: int | None = None
    """Requests before each measurement that do not count; default: one wave in a closed loop, one request in an open
    one."""
    seed: int = 0
    """Seed of the arrival times, of the prompts and of the requests."""
    timeout: float = 600.0
    """Seconds for one request."""
    wait: float = 0.0
    """Seconds to wait for a server that does not answer yet."""
    retry_429: bool = False
    """Ask again after ``Retry-After`` when the server is full; the time waited is part of the latency."""
    slo: Sequence[str] = ()
    """Objectives, such as ``e2e=2,ttfp=0.3``: a request counts for goodput when it keeps them all. Names: e2e, ttft,
    tpot, ttfp, underrun (seconds), rtf."""
    shape: str | None = None
    """Pictures of ``t2i``: WIDTHxHEIGHT/STEPS; default 1024x1024/50."""
    true_cfg_scale: float | None = None
    """Guidance of pictures; default: 4 for ``t2i`` and ``mixed``, the model's own for ``small``."""
    input_tokens: int | None = None
    """Length of the texts of ``tts`` (default 40) and ``omni`` (default 100), in words of about a token."""
    output_tokens: int | None = None
    """Text tokens of an answer of ``omni`` (default 100); those of ``tts`` where the server is asked for them."""
    frames_per_token: float | None = None
    """Sound frames for each text token of ``omni``, set for the stage that makes them (default 3.6); 0 lets the model
    end by itself."""
    json: str | None = None
    """File for all figures, with machine, versions and command."""
    plot: str | None = None
    """SVG file: latencies, throughput over time, open requests over time."""
    detail: bool = False
    """Put every request into the JSON, too."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        if self.concurrency is not None and self.request_rate is not None:
            raise ConfigError("concurrency and request_rate exclude each other", field="concurrency")
        for value in self.concurrency or ():
            if not (value >= 1 and value == int(value)):
                raise ConfigError(f"concurrency={value:g}: must be a whole number above 0", field="concurrency")
        for value in self.request_rate or ():
            if not 0 < value <= 1e5:
                raise ConfigError(f"request_rate={value:g}: must be above 0 and at most 100000", field="request_rate")
        if self.request_rate is not None and self.num_requests is None and self.duration is None:
            raise ConfigError("request_rate needs num_requests or duration", field="duration")
        lowest = {"num_requests": 1, "input_tokens": 1, "output_tokens": 1, "warmup": 0}
        for name, least in lowest.items():
            given = getattr(self, name)
            if given is not None and given < least:
                raise ConfigError(f"{name}={given}: must be at least {least}", field=name)
        if not self.timeout > 0 or (self.duration is not None and not self.duration > 0):
            name = "duration" if self.timeout > 0 else "timeout"
            raise ConfigError(f"{name} must be above 0", field=name)
        if not self.wait >= 0 or not (self.frames_per_token or 0) >= 0:
            name = "frames_per_token" if self.wait >= 0 else "wait"
            raise ConfigError(f"{name} must not be below 0", field=name)
        self._check_workload()
        _ = self.objectives

    def _check_workload(self) -> None:
        read = {
            "shape": ("t2i",),
            "true_cfg_scale": ("small", "t2i", "mixed"),
            "input_tokens": ("tts", "omni"),
            "output_tokens": ("tts", "omni"),
            "frames_per_token": ("omni",),
        }
        for name, workloads in read.items():
            if getattr(self, name) is not None and self.workload not in workloads:
                raise ConfigError(f"{name}: workload {self.workload} does not read it", field=name)

    @property
    def objectives(self) -> dict[str, float]:
        """The bounds of ``slo`` by name.

        Raises:
            ConfigError: an entry is not ``name=number``.
        """
        out = {}
        for entry in self.slo:
            name, _, text = entry.partition("=")
            try:
                out[name] = float(text)
            except ValueError:
                out[name] = -1.0
            if name not in SLO_NAMES or not out[name] >= 0:
                raise ConfigError(f"slo={entry!r}: expected NAME=NUMBER; names: {', '.join(SLO_NAMES)}", field="slo")
        return out

    @property
    def loads(self) -> list[tuple[int, float]]:
        """What is measured, one after another: (concurrency, 0) or (0, requests a second)."""
        if self.request_rate is not None:
            return [(0, rate) for rate in self.request_rate]
        return [(int(places), 0.0) for places in self.concurrency or (1.0,)]
