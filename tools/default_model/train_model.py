"""Trains text encoder and transformer together by flow matching on the autoencoder's latents."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from tools.default_model.data import WORDS, Shard, ShardSource, pictures
from tools.default_model.models import JointAttention, Layout, encode_text, is_unused, rotary_tables, velocity
from tools.default_model.optimiser import Clock, split_matrices
from tools.default_model.steps import Optimiser, Stepper
from tools.default_model.tokens import PREFIX
from tools.default_model.world import FORMATS

SHARES = (0.74, 0.13, 0.13)
"""How often a batch is of each canvas of FORMATS."""

CAPTION_DROPOUT = 0.1
"""Share of samples whose caption is replaced with an empty one, for classifier-free guidance."""


class Pool:
    """Room for the samples of one canvas on the device; it is filled while steps may already be recorded."""

    def __init__(self, number: int, patches: int, width: int, device: str) -> None:
        self.latents = torch.zeros(number, patches, width, dtype=torch.bfloat16, device=device)
        """Packed, normalised and padded, (number, patches, width)."""
        self.ids = torch.zeros(number, PREFIX + WORDS, dtype=torch.int16, device=device)
        """Tokens, (number, PREFIX + WORDS)."""
        self.counts = torch.full((number,), PREFIX + 1, dtype=torch.int16, device=device)
        """Tokens that are real, (number,)."""
        self.filled = torch.ones((), device=device)
        """Samples that are there (one empty one from the start)."""
        self._next = 0

    def append(self, latents: Tensor, ids: Tensor, counts: Tensor) -> None:
        """Add samples; latents may have fewer tokens than there is room for."""
        rows = slice(self._next, self._next + len(counts))
        self.latents[rows, : latents.shape[1]] = latents.to(self.latents.dtype)
        self.ids[rows] = ids.to(self.ids)
        self.counts[rows] = counts.to(self.counts)
        self._next = rows.stop
        self.filled.fill_(self._next)

    def rows(self, number: int) -> Tensor:
        """Random samples, as indices."""
        return (torch.rand(number, device=self.filled.device, dtype=torch.float64) * self.filled).long()


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h/2 * w/2, 4C), as the pipeline packs."""
    batch, channels, height, width = latents.shape
    latents = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return latents.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def time_shift(layout: Layout, tokens: int) -> float:
    """Factor by which the pipeline's scheduler moves the times of a picture of that many tokens towards noise."""
    config = layout.scheduler
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return math.exp(config["base_shift"] + slope * (tokens - config["base_image_seq_len"]))


def sample_times(number: int, shift: float, device: str) -> Tensor:
    """Times 0..1: logit-normal with a fifth uniform, moved as in sampling, exact in bfloat16; (number,)."""
    times = torch.sigmoid(torch.randn(number, device=device))
    uniform = torch.rand(number, device=device)
    times = torch.where(torch.rand(number, device=device) < 0.2, uniform, times)
    times = shift * times / (1 + (shift - 1) * times)
    return times.clamp(0.002, 0.998).bfloat16().float()


@torch.no_grad()
def append_shard(
    pool: Pool, vae: AutoencoderKLQwenImage, shard: Shard, canvas: tuple[int, int], device: str, batch: int = 1000
) -> None:
    """Draw a shard's pictures, encode them and add them to the pool."""
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1)
    for start in range(0, len(shard.counts), batch):
        rows = slice(start, start + batch)
        images = pictures(shard, rows, canvas, device)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
            moments = vae.quant_conv(vae.encoder(images.unsqueeze(2))).squeeze(2)
        latents = (moments.float().chunk(2, dim=1)[0] - mean) / std
        pool.append(pack(latents), torch.from_numpy(shard.ids[rows]), torch.from_numpy(shard.counts[rows]))


def warm_drawing(source: ShardSource, device: str) -> None:
    """Draw some pictures of every canvas, which compiles the drawing for it."""
    for canvas in FORMATS:
        pictures(next(iter(source.shards(canvas))), slice(0, 1000), canvas, device)


def fill_pools(pools: list[Pool], vae: AutoencoderKLQwenImage, source: ShardSource, device: str) -> None:
    """Encode everything that was ordered. The autoencoder must be flat and on the device."""
    for canvas, pool in zip(FORMATS, pools, strict=True):
        begun = time.monotonic()
        for shard in source.shards(canvas):
            append_shard(pool, vae, shard, canvas, device)
        print(f"pool {canvas}: {int(pool.filled)} samples in {time.monotonic() - begun:.0f} s", flush=True)


class Trainer:
    """Draws batches and computes the loss."""

    def __init__(
        self,
        layout: Layout,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        transformer: QwenImageTransformer2DModel,
        pools: list[Pool],
        empty: list[list[int]],
        device: str,
    ) -> None:
        self._text_encoder, self._transformer, self._pools, self._device = text_encoder, transformer, pools, device
        transformer.set_attn_processor(JointAttention())
        self._patches = [layout.patches(canvas) for canvas in FORMATS]
        self._room = max(self._patches)
        cell = layout.cell
        self._tables = [rotary_tables(transformer, h // cell, w // cell, WORDS, self._room) for w, h in FORMATS]
        self._shifts = [time_shift(layout, patches) for patches in self._patches]
        self._empty_ids = torch.zeros(len(empty), PREFIX + WORDS, dtype=torch.long, device=device)
        for index, ids in enumerate(empty):
            self._empty_ids[index, : len(ids)] = torch.tensor(ids, device=device)
        self._empty_counts = torch.tensor([len(ids) for ids in empty], device=device)

    def loss(self, which: int, number: int) -> Tensor:
        """Mean squared error of the velocity on a fresh batch of canvas `which`."""
        pool, device = self._pools[which], self._device
        rows = pool.rows(number)
        clean, ids, counts = pool.latents[rows].float(), pool.ids[rows].long(), pool.counts[rows].long()
        drop = torch.rand(number, device=device) < CAPTION_DROPOUT
        kind = torch.randint(len(self._empty_counts), (number,), device=device)
        ids = torch.where(drop[:, None], self._empty_ids[kind], ids)
        counts = torch.where(drop, self._empty_counts[kind], counts)
        patches = self._patches[which]
        times = sample_times(number, self._shifts[which], device)
        noise = torch.randn_like(clean)
        noisy = clean + times[:, None, None] * (noise - clean)
        words = torch.arange(WORDS, device=device)[None] < (counts - PREFIX)[:, None]
        picture = (torch.arange(self._room, device=device) < patches).expand(number, -1)
        mask = torch.cat([words, picture], dim=1)[:, None, None]
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
            text = encode_text(self._text_encoder, ids)[:, PREFIX:]
            out = velocity(self._transformer, noisy, text, mask, times, self._tables[which])
        return (out.float() - (noise - clean))[:, :patches].square().mean()


def trained_parameters(
    text_encoder: Qwen2_5_VLForConditionalGeneration, transformer: QwenImageTransformer2DModel
) -> list[tuple[str, nn.Parameter]]:
    """What is trained: all of the transformer that has an effect, and the text encoder without its eyes."""
    words = [(n, p) for n, p in text_encoder.named_parameters() if "visual." not in n and "lm_head" not in n]
    return [(n, p) for n, p in transformer.named_parameters() if not is_unused(transformer, n)] + words


@dataclass(frozen=True)
class Recipe:
    """How to train."""

    seconds: float
    """Time of training, compilation excluded."""
    batch: int = 1024
    """Samples per step."""
    muon_lr: float = 0.02
    """Learning rate of the matrices in the blocks."""
    adam_lr: float = 2e-3
    """Learning rate of everything else."""
    warmup: int = 150
    """Steps until the full learning rate."""
    average: float = 0.998
    """Decay of the moving average of the weights."""
    graphs: bool = False
    """Whether to record the steps as CUDA graphs."""
    deadline: float = math.inf
    """When training ends at the latest, as time.monotonic counts."""


def compile_blocks(text_encoder: Qwen2_5_VLForConditionalGeneration, transformer: QwenImageTransformer2DModel) -> None:
    """Compile the repeated blocks in place."""
    for layer in text_encoder.model.language_model.layers:
        layer.compile(dynamic=False)
    for block in transformer.transformer_blocks:
        block.compile(dynamic=False)


def make_stepper(trainer: Trainer, named: list[tuple[str, nn.Parameter]], recipe: Recipe) -> Stepper:
    """The training steps, one kind per canvas; run, and recorded if the recipe says so."""
    begun = time.monotonic()
    matrices, others = split_matrices(named)
    optimiser = Optimiser(matrices, others, recipe.muon_lr, recipe.adam_lr, recipe.average)
    losses = [functools.partial(trainer.loss, which, recipe.batch) for which in range(len(FORMATS))]
    stepper = Stepper(losses, optimiser)
    stepper.warm()
    print(f"first steps took {time.monotonic() - begun:.0f} s", flush=True)
    if recipe.graphs:
        stepper.record()
        for which in range(len(FORMATS)):
            begun = time.monotonic()
            for _ in range(5):
                stepper.step(which, 0.0)
            stepper.total.item()
            print(f"recorded step {which}: {(time.monotonic() - begun) / 5 * 1000:.1f} ms", flush=True)
        optimiser.restart()
        stepper.total.zero_()
    return stepper


def train_model(stepper: Stepper, recipe: Recipe, save: Callable[[], None], seed: int = 0) -> None:
    """Train for a time and leave the averaged weights in place.

    Args:
        stepper: from `make_stepper`.
        recipe: sizes and rates.
        save: called about every 90 seconds and at the end, with the averaged weights in place.
        seed: of batches, times and noise.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    clock, step, shares = Clock(recipe.seconds, recipe.warmup), 0, torch.tensor(SHARES)
    begun = saved = time.monotonic()
    clock.restart(recipe.deadline)
    while clock.share < 1:
        scale = clock.scale()
        stepper.step(int(torch.multinomial(shares, 1, generator=generator)), scale)
        step += 1
        if step % 25 == 0:
            stepper.total.item()  # waits for the GPU, so that the clock is right
        if step % 250 == 0:
            loss = stepper.total.item() / 250
            print(f"{time.monotonic() - begun:.0f} s step {step} loss {loss:.4f} rate {scale:.3f}", flush=True)
            stepper.total.zero_()
        if time.monotonic() - saved > 90:
            _save_average(stepper.optimiser, save)
            saved = time.monotonic()
    print(f"{step} steps of {recipe.batch} in {time.monotonic() - begun:.0f} s", flush=True)
    stepper.optimiser.average.install()
    save()


def _save_average(optimiser: Optimiser, save: Callable[[], None]) -> None:
    backup = [p.detach().clone() for p in optimiser.parameters]
    optimiser.average.install()
    save()
    with torch.no_grad():
        torch._foreach_copy_(optimiser.parameters, backup)
