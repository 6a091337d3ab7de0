"""The examples of the omni models: their command line with a file of every kind, and the sound that they write."""

from __future__ import annotations

import wave
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from tests.ratchets.source import ROOT

EXAMPLES = ROOT / "examples" / "offline_inference"


def command(family: str, checkpoint: Path, stages: Path, folder: Path, speaker: str, seconds: int) -> list[str]:
    """The script and its arguments; writes the files, a video of ``seconds`` among them, into ``folder``, where it is
    to be run."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / "picture.png")
    with wave.open(str(folder / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 24000, 0, "NONE", ""))
        file.writeframes(rng.integers(-9999, 9999, 12000).astype(np.int16).tobytes())
    writer = cv2.VideoWriter(str(folder / "video.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 8, (64, 64))
    for _ in range(8 * seconds):
        writer.write(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    writer.release()
    model = ["--model", str(checkpoint), "--stage-configs-path", str(stages)]
    files = ["--image", "picture.png", "--audio", "sound.wav", "--video", "video.mp4"]
    script = str(EXAMPLES / family / "end2end.py")
    return [script, *model, *files, "--speaker", speaker, "--output", "answer.wav", "what is it"]


def check_answer(folder: Path, printed: str, samples: int) -> None:
    """The answer is sound of ``samples`` samples, and its length is told."""
    with wave.open(str(folder / "answer.wav")) as file:
        assert file.getparams()[:3] == (1, 2, 24000)
        assert file.getnframes() == samples
        values = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
    assert values.std() > 100
    assert f"answer.wav: {samples / 24000:.2f} s" in printed
