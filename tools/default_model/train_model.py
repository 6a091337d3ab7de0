"""Trains text encoder and transformer together by flow matching on the autoencoder's latents."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from tools.default_model.data import WORDS_PER_FORMAT, Shard, ShardSource, pictures
from tools.default_model.models import SCHEDULER, JointAttention, encode_text, rotary_tables, velocity
from tools.default_model.optimiser import Average, Clock, Muon, split_matrices
from tools.default_model.tokens import PREFIX
from tools.default_model.world import FORMATS

SHARES = (0.74, 0.13, 0.13)
"""How often a batch is of each canvas of FORMATS."""

CAPTION_DROPOUT = 0.1
"""Share of samples whose caption is replaced with an empty one, for classifier-free guidance."""


@dataclass
class Pool:
    """All samples of one canvas, on the device."""

    latents: Tensor
    """Packed and normalised, (N, tokens, 64), bfloat16."""
    ids: Tensor
    """(N, PREFIX + words), int16."""
    counts: Tensor
    """(N,), int16."""


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h/2 * w/2, 4C), as the pipeline packs."""
    batch, channels, height, width = latents.shape
    latents = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return latents.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def time_shift(tokens: int) -> float:
    """Factor by which the pipeline's scheduler moves the times of a picture of that many tokens towards noise."""
    slope = (SCHEDULER["max_shift"] - SCHEDULER["base_shift"]) / (
        SCHEDULER["max_image_seq_len"] - SCHEDULER["base_image_seq_len"]
    )
    return math.exp(SCHEDULER["base_shift"] + slope * (tokens - SCHEDULER["base_image_seq_len"]))


def sample_times(number: int, tokens: int, device: str) -> Tensor:
    """Times 0..1: logit-normal with a fifth uniform, moved as in sampling, exact in bfloat16; (number,)."""
    times = torch.sigmoid(torch.randn(number, device=device))
    uniform = torch.rand(number, device=device)
    times = torch.where(torch.rand(number, device=device) < 0.2, uniform, times)
    shift = time_shift(tokens)
    times = shift * times / (1 + (shift - 1) * times)
    return times.clamp(0.002, 0.998).bfloat16().float()


@torch.no_grad()
def encode_shard(vae: AutoencoderKLQwenImage, shard: Shard, canvas: tuple[int, int], device: str, batch: int) -> Pool:
    """Draw a shard's pictures and encode them."""
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1)
    parts = []
    for start in range(0, len(shard.counts), batch):
        images = pictures(shard, slice(start, start + batch), canvas, device)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
            moments = vae.quant_conv(vae.encoder(images.unsqueeze(2))).squeeze(2)
        latents = (moments.float().chunk(2, dim=1)[0] - mean) / std
        parts.append(pack(latents).bfloat16())
    ids = torch.from_numpy(shard.ids).to(device).short()
    return Pool(torch.cat(parts), ids, torch.from_numpy(shard.counts).to(device).short())


def make_pools(vae: AutoencoderKLQwenImage, source: ShardSource, device: str, batch: int = 1000) -> list[Pool]:
    """Encode everything that was ordered; one pool per canvas. The autoencoder must be flat and on the device."""
    pools = []
    for canvas in FORMATS:
        begun = time.monotonic()
        parts = [encode_shard(vae, shard, canvas, device, batch) for shard in source.shards(canvas)]
        pool = Pool(*(torch.cat([getattr(p, name) for p in parts]) for name in ("latents", "ids", "counts")))
        print(f"pool {canvas}: {len(pool.counts)} samples in {time.monotonic() - begun:.0f} s", flush=True)
        pools.append(pool)
    return pools


class Trainer:
    """Draws batches and computes the loss."""

    def __init__(
        self,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        transformer: QwenImageTransformer2DModel,
        pools: list[Pool],
        empty: list[list[int]],
        device: str,
    ) -> None:
        self._text_encoder, self._transformer, self._pools, self._device = text_encoder, transformer, pools, device
        transformer.set_attn_processor(JointAttention())
        self._tables: list[Any] = []
        self._empty: list[tuple[Tensor, Tensor]] = []
        for canvas, pool in zip(FORMATS, pools, strict=True):
            words = WORDS_PER_FORMAT[canvas]
            self._tables.append(rotary_tables(transformer, canvas[1] // 16, canvas[0] // 16, words))
            rows = torch.zeros(len(empty), PREFIX + words, dtype=torch.long, device=device)
            for index, ids in enumerate(empty):
                rows[index, : len(ids)] = torch.tensor(ids, device=device)
            self._empty.append((rows, torch.tensor([len(ids) for ids in empty], device=device)))
            del pool

    def loss(self, which: int, number: int) -> Tensor:
        """Mean squared error of the velocity on a fresh batch of canvas `which`."""
        pool, device = self._pools[which], self._device
        rows = torch.randint(len(pool.counts), (number,), device=device)
        clean, ids, counts = pool.latents[rows].float(), pool.ids[rows].long(), pool.counts[rows].long()
        drop = torch.rand(number, device=device) < CAPTION_DROPOUT
        empty_ids, empty_counts = self._empty[which]
        kind = torch.randint(len(empty_counts), (number,), device=device)
        ids = torch.where(drop[:, None], empty_ids[kind], ids)
        counts = torch.where(drop, empty_counts[kind], counts)
        times = sample_times(number, clean.shape[1], device)
        noise = torch.randn_like(clean)
        noisy = clean + times[:, None, None] * (noise - clean)
        words = WORDS_PER_FORMAT[FORMATS[which]]
        real = torch.arange(words, device=device)[None] < (counts - PREFIX)[:, None]
        mask = torch.cat([real, real.new_ones(number, clean.shape[1])], dim=1)[:, None, None]
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
            text = encode_text(self._text_encoder, ids)[:, PREFIX:]
            out = velocity(self._transformer, noisy, text, mask, times, self._tables[which])
        return (out.float() - (noise - clean)).square().mean()


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
    average: float = 0.999
    """Decay of the moving average of the weights."""


def compile_blocks(text_encoder: Qwen2_5_VLForConditionalGeneration, transformer: QwenImageTransformer2DModel) -> None:
    """Compile the repeated blocks in place."""
    for layer in text_encoder.model.language_model.layers:
        layer.compile(dynamic=False)
    for block in transformer.transformer_blocks:
        block.compile(dynamic=False)


def train_model(trainer: Trainer, modules: list[nn.Module], recipe: Recipe, save: Any, seed: int = 0) -> None:
    """Train for a time and leave the averaged weights in the modules.

    Args:
        trainer: makes losses.
        modules: what is trained; parameters that need no gradient are left out.
        recipe: sizes and rates.
        save: called without arguments about every 90 seconds with the averaged weights in place.
        seed: of batches, times and noise.
    """
    torch.manual_seed(seed)
    matrices, others = split_matrices(modules)
    cuda = others[0].is_cuda
    muon = Muon(matrices, recipe.muon_lr)
    adam = torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda)
    everything = matrices + others
    average = Average(everything, recipe.average)
    generator = torch.Generator().manual_seed(seed)
    clock, step, total = Clock(recipe.seconds, recipe.warmup), 0, torch.zeros((), device=others[0].device)
    begun = saved = time.monotonic()
    while clock.share < 1 or step < 12:
        which = int(torch.multinomial(torch.tensor(SHARES), 1, generator=generator)) if step >= 6 else step % 3
        loss = trainer.loss(which, recipe.batch)
        for parameter in everything:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(everything, 1.0, foreach=True)
        scale = clock.scale()
        adam.param_groups[0]["lr"] = recipe.adam_lr * scale
        adam.step()
        muon.step(scale)
        average.update()
        total += loss.detach()
        step += 1
        if step == 6:
            print(f"first steps took {time.monotonic() - begun:.0f} s", flush=True)
            clock.restart()
        if step % 250 == 0:
            print(
                f"{time.monotonic() - begun:.0f} s step {step} loss {total.item() / 250:.4f} rate {scale:.3f}",
                flush=True,
            )
            total.zero_()
        if time.monotonic() - saved > 90:
            backup = [p.detach().clone() for p in everything]
            average.install()
            save()
            with torch.no_grad():
                torch._foreach_copy_(everything, backup)
            saved = time.monotonic()
    print(f"{step} steps of {recipe.batch} in {time.monotonic() - begun:.0f} s", flush=True)
    average.install()
    save()
