"""The vocoder: transformers' samples, in windows and batches."""

from collections.abc import Sequence

import pytest
import torch

from tests.model_executor.qwen3_omni.support import Reference
from vllm_omni.model_executor.layers.dense import load_dense_weights
from vllm_omni.model_executor.models.qwen3_omni.vocoder import CodeWindow, Vocoder
from vllm_omni.model_executor.stage_input_processors.codec_chunks import ChunkSchedule, FrameStream
from vllm_omni.model_executor.stage_input_processors.qwen3_omni import CONV_CONTEXT

FRAMES = 70
ATOL = 2e-4
"""Rounding of the convolution stack in float32; samples lie in [-1, 1]."""


@pytest.fixture(scope="module")
def vocoder(reference: Reference) -> Vocoder:
    model = Vocoder(reference.config.code2wav_config)
    load_dense_weights(model, reference.model.code2wav.state_dict().items())
    return model


@pytest.fixture(scope="module")
def codes() -> torch.Tensor:
    """[3, FRAMES, groups]"""
    return torch.randint(0, 128, (3, FRAMES, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def waves(reference: Reference, codes: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return reference.model.code2wav(codes.transpose(1, 2))[:, 0]


def streamed(vocoder: Vocoder, codes_TQ: torch.Tensor, schedule: ChunkSchedule) -> tuple[torch.Tensor, list[int]]:
    """Samples of a stream that brings one frame at a time, and the new frames of each window."""
    stream: FrameStream[torch.Tensor] = FrameStream()
    parts, sizes = [], []
    for number, frame in enumerate(codes_TQ):
        window = stream.take([frame], schedule, last=number == len(codes_TQ) - 1)
        if window is not None:
            given = CodeWindow(torch.stack(list(window.frames)), window.context, window.start)
            (wave,) = vocoder.decode([given])
            assert len(wave) == vocoder.samples(given)
            parts.append(wave)
            sizes.append(window.fresh)
    return torch.cat(parts), sizes


def test_equals_the_reference(vocoder: Vocoder, codes: torch.Tensor, waves: torch.Tensor) -> None:
    with torch.inference_mode():
        for got, want in zip(vocoder.decode([CodeWindow(c) for c in codes]), waves, strict=True):
            assert got.shape == want.shape == (FRAMES * 1920 - 555,)
            torch.testing.assert_close(got, want, atol=ATOL, rtol=0)


@pytest.mark.parametrize("max_frames", [18, 40])
def test_lengths_in_one_batch_and_cut_to_fit(
    vocoder: Vocoder, codes: torch.Tensor, waves: torch.Tensor, max_frames: int
) -> None:
    """A wave's beginning does not depend on what follows, nor on the batch, nor on how a long window is cut."""
    lengths = (FRAMES, 33, 5)
    with torch.inference_mode():
        windows = [CodeWindow(c[:n]) for c, n in zip(codes, lengths, strict=True)]
        for got, want, n in zip(vocoder.decode(windows, max_frames), waves, lengths, strict=True):
            assert got.shape == (n * 1920 - 555,)
            torch.testing.assert_close(got, want[: n * 1920 - 555], atol=ATOL, rtol=0)


@pytest.mark.parametrize(("first", "steady"), [(1, 1), (2, 9), (4, 25)])
def test_a_stream_gives_the_same_samples(
    vocoder: Vocoder, codes: torch.Tensor, waves: torch.Tensor, first: int, steady: int
) -> None:
    schedule = ChunkSchedule(steady, first, vocoder.exact_context)
    with torch.inference_mode():
        got, sizes = streamed(vocoder, codes[0], schedule)
    assert sizes[0] == first
    assert all(size == min(steady, first << i) for i, size in enumerate(sizes[:-1]))
    assert got.shape == waves[0].shape
    torch.testing.assert_close(got, waves[0], atol=ATOL, rtol=0)


def test_less_context_is_not_the_same(vocoder: Vocoder, codes: torch.Tensor, waves: torch.Tensor) -> None:
    """The exact context is what is needed: a good deal less is heard."""
    with torch.inference_mode():
        got, _ = streamed(vocoder, codes[0], ChunkSchedule(10, 10, vocoder.conv_context + 1))
    assert got.shape == waves[0].shape
    assert (got - waves[0]).abs().max() > 100 * ATOL


def test_the_references_own_chunks_lose_samples(reference: Reference, codes: torch.Tensor, waves: torch.Tensor) -> None:
    """transformers decodes long waves in chunks and drops 555 samples between two of them; ours are without gap."""
    with torch.inference_mode():
        chunked = reference.model.code2wav.chunked_decode(codes[:1].transpose(1, 2), 40, 25)
    assert chunked.shape[-1] == waves.shape[-1] - 555


def test_geometry(vocoder: Vocoder) -> None:
    assert (vocoder.samples_per_frame, vocoder.lookahead) == (1920, 555)
    assert vocoder.exact_context == vocoder.pre_transformer.reach + CONV_CONTEXT


@pytest.mark.parametrize("context", [0, 3, 10])
def test_too_little_context_inside_a_wave_is_refused(vocoder: Vocoder, codes: torch.Tensor, context: int) -> None:
    with pytest.raises(ValueError, match="context"):
        vocoder.decode([CodeWindow(codes[0], context, start=20)])


def test_without_frames_the_schedule_waits() -> None:
    stream: FrameStream[int] = FrameStream()
    schedule = ChunkSchedule(8, 2, 4)

    def take(new: Sequence[int], last: bool = False) -> tuple[list[int], int, int] | None:
        window = stream.take(new, schedule, last)
        return None if window is None else (list(window.frames), window.start, window.context)

    assert take([0]) is None
    assert take([1]) == ([0, 1], 0, 0)
    assert take([2, 3, 4]) is None
    assert take([5, 6, 7]) == ([0, 1, 2, 3, 4, 5, 6, 7], 0, 2)
    assert take([], last=True) is None
