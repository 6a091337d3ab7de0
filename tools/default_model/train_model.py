"""Trains text encoder and transformer together by flow matching on the autoencoder's latents."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration

from tools.default_model.data import PATCHES, WORDS, Shard, ShardSource, pictures
from tools.default_model.models import SCHEDULER, JointAttention, encode_text, is_unused, rotary_tables, velocity
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
    """Packed, normalised and padded, (N, PATCHES, 64), bfloat16."""
    ids: Tensor
    """(N, PREFIX + WORDS), int16."""
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
        packed = pack(latents).bfloat16()
        parts.append(functional.pad(packed, (0, 0, 0, PATCHES - packed.shape[1])))
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
        self._tables = [rotary_tables(transformer, h // 16, w // 16, WORDS, PATCHES) for w, h in FORMATS]
        self._patches = [(w // 16) * (h // 16) for w, h in FORMATS]
        self._empty_ids = torch.zeros(len(empty), PREFIX + WORDS, dtype=torch.long, device=device)
        for index, ids in enumerate(empty):
            self._empty_ids[index, : len(ids)] = torch.tensor(ids, device=device)
        self._empty_counts = torch.tensor([len(ids) for ids in empty], device=device)

    def loss(self, which: int, number: int) -> Tensor:
        """Mean squared error of the velocity on a fresh batch of canvas `which`."""
        pool, device = self._pools[which], self._device
        rows = torch.randint(len(pool.counts), (number,), device=device)
        clean, ids, counts = pool.latents[rows].float(), pool.ids[rows].long(), pool.counts[rows].long()
        drop = torch.rand(number, device=device) < CAPTION_DROPOUT
        kind = torch.randint(len(self._empty_counts), (number,), device=device)
        ids = torch.where(drop[:, None], self._empty_ids[kind], ids)
        counts = torch.where(drop, self._empty_counts[kind], counts)
        patches = self._patches[which]
        times = sample_times(number, patches, device)
        noise = torch.randn_like(clean)
        noisy = clean + times[:, None, None] * (noise - clean)
        words = torch.arange(WORDS, device=device)[None] < (counts - PREFIX)[:, None]
        picture = (torch.arange(PATCHES, device=device) < patches).expand(number, -1)
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


class Stepper:
    """One training step; on a GPU it can be recorded as a CUDA graph, since launching costs more than the work."""

    def __init__(self, trainer: Trainer, named: list[tuple[str, nn.Parameter]], recipe: Recipe) -> None:
        matrices, others = split_matrices(named)
        self.parameters = matrices + others
        device = others[0].device
        self._trainer, self._recipe = trainer, recipe
        self._muon = Muon(matrices, recipe.muon_lr)
        self._scale = torch.zeros((), device=device)
        self._lr = torch.zeros((), device=device)
        self._adam = torch.optim.AdamW(
            others, lr=self._lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=others[0].is_cuda
        )
        self.average = Average(self.parameters, recipe.average)
        self.total = torch.zeros((), device=device)
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def _body(self, which: int) -> None:
        loss = self._trainer.loss(which, self._recipe.batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self._adam.step()
        self._muon.step(self._scale)
        self.average.update()
        self.total += loss.detach()

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def record(self) -> None:
        """Record the graphs; steps must have been run before on every canvas."""
        torch.cuda.synchronize()
        for which in range(len(FORMATS)):
            self._forget_gradients()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._body(which)
            self._graphs.append(graph)

    def step(self, which: int, scale: float) -> None:
        """Train on one batch of canvas `which` with the recipe's rates times scale."""
        self._scale.fill_(scale)
        self._lr.fill_(scale * self._recipe.adam_lr)
        if self._graphs:
            self._graphs[which].replay()
            return
        self._forget_gradients()
        self._body(which)


def train_model(
    trainer: Trainer, named: list[tuple[str, nn.Parameter]], recipe: Recipe, save: Callable[[], None], seed: int = 0
) -> None:
    """Train for a time and leave the averaged weights in place.

    Args:
        trainer: makes losses.
        named: the parameters with their names.
        recipe: sizes and rates.
        save: called about every 90 seconds and at the end, with the averaged weights in place.
        seed: of batches, times and noise.
    """
    torch.manual_seed(seed)
    stepper = Stepper(trainer, named, recipe)
    generator = torch.Generator().manual_seed(seed)
    clock, step = Clock(recipe.seconds, recipe.warmup), 0
    begun = saved = time.monotonic()
    while clock.share < 1 or step < 12:
        which = int(torch.multinomial(torch.tensor(SHARES), 1, generator=generator)) if step >= 6 else step % 3
        scale = clock.scale()
        stepper.step(which, scale)
        step += 1
        if step == 6:
            if recipe.graphs:
                stepper.record()
            print(f"first steps took {time.monotonic() - begun:.0f} s", flush=True)
            clock.restart(recipe.deadline)
            stepper.total.zero_()
        if step % 50 == 6:
            stepper.total.item()  # waits for the GPU, so that the clock is right
        if step % 250 == 6 and step > 6:
            loss = stepper.total.item() / 250
            print(f"{time.monotonic() - begun:.0f} s step {step} loss {loss:.4f} rate {scale:.3f}", flush=True)
            stepper.total.zero_()
        if time.monotonic() - saved > 90:
            _save_average(stepper, save)
            saved = time.monotonic()
    print(f"{step} steps of {recipe.batch} in {time.monotonic() - begun:.0f} s", flush=True)
    stepper.average.install()
    save()


def _save_average(stepper: Stepper, save: Callable[[], None]) -> None:
    backup = [p.detach().clone() for p in stepper.parameters]
    stepper.average.install()
    save()
    with torch.no_grad():
        torch._foreach_copy_(stepper.parameters, backup)
