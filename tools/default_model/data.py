"""Training data: processes draw scenes and captions, the device draws the pictures."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tools.default_model.scene import background, primitives
from tools.default_model.shapes import draw
from tools.default_model.tokens import Encoder
from tools.default_model.world import FORMATS, sample

WORDS = 40
"""Caption tokens with the template's end, padded."""

TOKENIZER = Path("vllm_omni/data/default_model/tokenizer")
"""The tokenizer that is shipped, from the repository's root."""

SHARD = 10000
"""Scenes per task of a data process."""


@dataclass
class Shard:
    """Scenes of one canvas as arrays."""

    primitives: np.ndarray
    """(N, MAX_PRIMITIVES, PRIMITIVE_FIELDS), float32."""
    backgrounds: np.ndarray
    """(N, BACKGROUND_FIELDS), float32."""
    ids: np.ndarray
    """(N, PREFIX + WORDS), int64."""
    counts: np.ndarray
    """Tokens that are real, (N,), int64."""


TRAINING_MIX = {
    "single": 0.06,
    "position": 0.06,
    "texture": 0.14,
    "count": 0.14,
    "relation": 0.22,
    "inside": 0.12,
    "between": 0.11,
    "things": 0.08,
    "text": 0.07,
}
"""Share of each kind of picture in training: more of what is hard than the world has."""

DETAIL_MIX = {
    "single": 0.04,
    "position": 0.04,
    "texture": 0.30,
    "count": 0.10,
    "inside": 0.16,
    "between": 0.10,
    "things": 0.16,
    "text": 0.10,
}
"""The same for the autoencoder, to which only small shapes and fine textures are hard."""


def make_shard(
    seed: int, number: int, canvas: tuple[int, int], tokenizer: Path, mix: dict[str, float] = TRAINING_MIX
) -> Shard:
    """Draw training scenes; the same seed gives the same shard."""
    rng = random.Random(seed)
    kinds = rng.choices(tuple(mix), tuple(mix.values()), k=number)
    scenes = [sample(rng, "train", *canvas, category=kind) for kind in kinds]
    ids, counts = Encoder(tokenizer)([scene.caption for scene in scenes], WORDS)
    return Shard(
        np.stack([primitives(scene.items) for scene in scenes]),
        np.stack([background(scene.ground) for scene in scenes]),
        ids,
        counts,
    )


class ShardSource:
    """Makes shards ahead in other processes. Close it, or use it as a context."""

    def __init__(self, seed: int, tokenizer: Path, workers: int, mix: dict[str, float] = TRAINING_MIX) -> None:
        # forked, so that the processes need not import the training code again; open this before CUDA starts
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
        context = multiprocessing.get_context("fork")
        self._executor = ProcessPoolExecutor(max_workers=workers, mp_context=context)
        self._tokenizer = tokenizer
        self._seed = seed
        self._mix = mix
        self._pending: dict[tuple[int, int], list[Future[Shard]]] = {canvas: [] for canvas in FORMATS}

    def __enter__(self) -> ShardSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def order(self, canvas: tuple[int, int], number: int, shard: int = SHARD) -> None:
        """Begin to make that many scenes of a canvas."""
        for start in range(0, number, shard):
            self._seed += 1
            size = min(shard, number - start)
            task = self._executor.submit(make_shard, self._seed, size, canvas, self._tokenizer, self._mix)
            self._pending[canvas].append(task)

    def shards(self, canvas: tuple[int, int]) -> Iterator[Shard]:
        """The ordered shards, in order, as they get ready; they stay available for a second pass."""
        for task in self._pending[canvas]:
            yield task.result()


def pictures(shard: Shard, rows: slice | np.ndarray, canvas: tuple[int, int], device: str) -> Tensor:
    """Pictures (N, 3, H, W) of some rows of a shard on the device, float32, -1..1."""
    compiled = device.startswith("cuda")
    records = torch.from_numpy(shard.primitives[rows]).to(device)
    grounds = torch.from_numpy(shard.backgrounds[rows]).to(device)
    return draw(records, grounds, canvas[1], canvas[0], compiled=compiled) * 2 - 1
