"""The store of ``/v1/videos``: one job a video, its file on disk until it expires, is deleted or the server ends."""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_omni.entrypoints.openai.errors import describe
from vllm_omni.errors import NotFoundError, OmniError, OverloadError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)
LIFE_S = 3600
MAX_JOBS = 256


@dataclass
class VideoJob:
    """One video, being made or there."""

    model: str
    prompt: str
    size: str
    seconds: str
    id: str = field(default_factory=lambda: f"video_gen_{uuid.uuid4().hex}")
    created_at: int = field(default_factory=lambda: int(time.time()))
    status: str = "queued"
    """``queued``, ``in_progress``, ``completed``, ``failed``."""
    progress: int = 0
    """Percent."""
    completed_at: int | None = None
    error: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the finished file: frames, frames per second, seconds, times by stage."""
    task: asyncio.Task[None] | None = None

    def shown(self) -> dict[str, Any]:
        """OpenAI's form of it, and the facts."""
        return {
            "id": self.id,
            "object": "video",
            "model": self.model,
            "prompt": self.prompt,
            "status": self.status,
            "progress": self.progress,
            "created_at": self.created_at,
            "completed_at": self.completed_at,
            "expires_at": None if self.completed_at is None else self.completed_at + LIFE_S,
            "size": self.size,
            "seconds": self.seconds,
            "quality": "standard",
            "remixed_from_video_id": None,
            "error": self.error,
            "file_name": f"{self.id}.mp4" if self.status == "completed" else None,
            **self.facts,
        }


class VideoJobs:
    """All jobs of a server. Lives in its event loop."""

    def __init__(self) -> None:
        self._jobs: dict[str, VideoJob] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self, job: VideoJob, work: Callable[[VideoJob], Awaitable[bytes]]) -> asyncio.Task[None]:
        """Run ``work``, which makes the file; returns the task that does.

        Raises:
            OverloadError: too many jobs are kept, and none has expired.
        """
        self._expire()
        if len(self._jobs) >= MAX_JOBS:
            raise OverloadError(f"{MAX_JOBS} videos are kept; delete some", retry_after=60, code="too_many_videos")
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._run(job, work))
        return job.task

    async def _run(self, job: VideoJob, work: Callable[[VideoJob], Awaitable[bytes]]) -> None:
        try:
            data = await work(job)
            await asyncio.to_thread(self._path(job).write_bytes, data)
            job.status, job.progress = "completed", 100
        except OmniError as error:
            message, status, _, code = describe(error)
            job.status, job.error = "failed", {"code": code or str(status), "message": message}
            if status >= 500:
                logger.error("video %s failed: %s", job.id, message)
        job.completed_at = int(time.time())

    def get(self, name: str) -> VideoJob:
        """The job ``name``. Raises ``NotFoundError``."""
        self._expire()
        if name not in self._jobs:
            raise NotFoundError(f"no video {name[:80]!r}", field="video_id", code="video_not_found")
        return self._jobs[name]

    def listed(self) -> list[VideoJob]:
        """All jobs, the oldest first."""
        self._expire()
        return list(self._jobs.values())

    def file(self, job: VideoJob) -> Path:
        """The finished file.

        Raises:
            NotFoundError: it is not finished, or failed.
        """
        if job.status != "completed":
            raise NotFoundError(f"video {job.id} is {job.status}", field="video_id", code="video_not_ready")
        return self._path(job)

    def _path(self, job: VideoJob) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="vllm-omni-videos-")
        return Path(self._folder.name) / f"{job.id}.mp4"

    def delete(self, job: VideoJob) -> None:
        """Forget a job; one that is being made is cancelled."""
        del self._jobs[job.id]
        if job.task is not None:
            job.task.cancel()
        self._path(job).unlink(missing_ok=True)

    def _expire(self) -> None:
        now = time.time()
        for job in list(self._jobs.values()):
            if job.completed_at is not None and job.completed_at + LIFE_S < now:
                self.delete(job)

    async def close(self) -> None:
        """Cancel everything and remove the files."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None and not job.task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._folder is not None:
            self._folder.cleanup()
