"""Cutting a stream of codec frames into windows for a vocoder.

A window is the new frames plus frames of context before (and, for vocoders that look ahead, after) them. The first
window is small, so that sound starts early; each further one may be twice as long, up to the steady size, because by
then there is sound to play meanwhile. Without streaming there is one window with everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

from vllm_omni.errors import ConfigError

Frame = TypeVar("Frame")


@dataclass(frozen=True)
class ChunkSchedule:
    """How a stream of frames is cut; the fields are keys of the connector's ``extra``."""

    codec_chunk_frames: int = 25
    """New frames in a window once the stream runs."""
    initial_codec_chunk_frames: int = 4
    """New frames in the first window."""
    codec_left_context_frames: int = 25
    """Frames before the new ones that are sent again."""
    codec_right_context_frames: int = 0
    """Frames after the new ones that a window of a running stream waits for, for vocoders that look ahead."""
    initial_codec_right_context_frames: int | None = None
    """The same for the first window; None: as many as for the others."""

    @classmethod
    def of(cls, extra: Mapping[str, Any], **defaults: int) -> ChunkSchedule:
        """The schedule that a connector's ``extra`` describes; ``defaults`` are the model's, a first window's as far as
        the later ones have as much.

        Raises:
            ConfigError: a value that is no count, or a first window with more than the later ones.
        """
        values = {**defaults, **{key: extra[key] for key in KEYS if key in extra}}
        for key, value in values.items():
            lowest = 0 if key.endswith("_context_frames") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ConfigError(f"connector extra: {key}={value!r}: a count from {lowest} is needed", field=key)
        schedule = cls(**values)
        for first, later in _ORDERED:
            initial, most = getattr(schedule, first), getattr(schedule, later)
            if initial is None or initial <= most:
                continue
            if first in extra:
                raise ConfigError(f"connector extra: {first}={initial} is more than {later}={most}", field=first)
            schedule = replace(schedule, **{first: most})
        return schedule

    def ahead(self, number: int) -> int:
        """Frames after the new ones that window ``number`` waits for."""
        first = self.initial_codec_right_context_frames
        return self.codec_right_context_frames if number or first is None else first

    def size(self, number: int) -> int:
        """New frames that window ``number`` waits for; a second window that waits for more frames after them than the
        first needs so many fewer, so that it does not come later for it."""
        size = min(self.codec_chunk_frames, self.initial_codec_chunk_frames << min(number, 30))
        return max(1, size - (self.ahead(1) - self.ahead(0))) if number == 1 else size


_ORDERED = (
    ("initial_codec_chunk_frames", "codec_chunk_frames"),
    ("initial_codec_right_context_frames", "codec_right_context_frames"),
)
KEYS = tuple(f.name for f in fields(ChunkSchedule))
"""Keys of a connector's ``extra`` that are read here and not by the connector."""


@dataclass(frozen=True)
class Window(Generic[Frame]):
    """Frames to decode."""

    frames: Sequence[Frame]
    """Context before, new frames, context after."""
    start: int
    """Number of the first of ``frames`` in the stream."""
    context: int
    """How many of ``frames`` come before the new ones."""
    fresh: int
    """How many are new."""


class FrameStream(Generic[Frame]):
    """The frames of one request, and how far they have been handed on."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.done = 0
        self.windows = 0

    def take(self, new: Sequence[Frame], schedule: ChunkSchedule, last: bool, align: int = 1) -> Window[Frame] | None:
        """Add ``new`` frames; the next window if enough have come (with ``last``: if any is left), else None.

        Args:
            new: frames that follow those before.
            schedule: sizes.
            last: whether the stream ends here.
            align: windows start at multiples of this, for vocoders that see frames in blocks. The first window waits
                for whole blocks; the new frames of those between it and the last end at a multiple too, where that
                takes no more than ``codec_chunk_frames``.
        """
        self.frames.extend(new)
        wait = 1 if last else schedule.size(self.windows)
        lookahead = 0 if last else schedule.ahead(self.windows)
        if not (self.windows or last):
            lookahead += -(wait + lookahead) % align
        end = len(self.frames) - lookahead
        if self.windows and not last and end - self.done < schedule.codec_chunk_frames:
            end = end // align * align
        fresh = end - self.done
        if fresh < wait:
            return None
        start = max(0, self.done - schedule.codec_left_context_frames) // align * align
        window = Window(self.frames[start : end + lookahead], start, self.done - start, fresh)
        self.done, self.windows = end, self.windows + 1
        return window
