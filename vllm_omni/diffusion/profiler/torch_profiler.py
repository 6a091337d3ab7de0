"""A torch profiler trace of one rank, written as a Chrome trace (open it in Perfetto or chrome://tracing)."""

from __future__ import annotations

import os

import torch
from torch.profiler import ProfilerActivity, profile

from vllm_omni.errors import RequestError


class RankProfiler:
    """Starts and stops the trace of one rank."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._profile: profile | None = None
        self._path = ""

    def start(self, folder: str) -> None:
        """Start recording.

        Raises:
            RequestError: a trace is being recorded already.
        """
        if self._profile is not None:
            raise RequestError("a trace is being recorded already; stop_profile first", field="start_profile")
        os.makedirs(folder, exist_ok=True)
        self._path = os.path.join(folder, f"diffusion-rank{self._rank}-{os.getpid()}.trace.json")
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def stop(self) -> str:
        """Stop recording and write the trace; returns its path.

        Raises:
            RequestError: no trace is being recorded.
        """
        if self._profile is None:
            raise RequestError("no trace is being recorded; start_profile first", field="stop_profile")
        running, self._profile = self._profile, None
        running.stop()
        running.export_chrome_trace(self._path)
        return self._path
