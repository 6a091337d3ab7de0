"""Trains the autoencoder: `python -m tools.default_model.train_vae --out FOLDER`. See README.md.

A picture is one frame, so the 3-D convolutions are trained as the 2-D ones they then are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn
from torch.nn import functional

from tools.default_model.data import DETAIL_MIX, SHARD, TOKENIZER, ShardSource, pictures
from tools.default_model.models import LAYOUTS, make_vae
from tools.default_model.optimiser import Clock
from tools.default_model.shapes import draw
from tools.default_model.steps import Optimiser, Stepper
from tools.default_model.world import FORMATS


class FlatConv(nn.Module):
    """A causal 3-D convolution as it acts on one frame: the last temporal slice of its kernel, in 2-D."""

    def __init__(self, source: QwenImageCausalConv3d) -> None:
        super().__init__()
        self.weight = nn.Parameter(source.weight.detach()[:, :, -1].clone())
        self.bias = nn.Parameter(source.bias.detach().clone())
        self.padding = self.weight.shape[-1] // 2

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        """(B, C, 1, H, W) to (B, D, 1, H, W)."""
        return functional.conv2d(x.squeeze(2), self.weight, self.bias, padding=self.padding).unsqueeze(2)

    def write(self, target: QwenImageCausalConv3d) -> None:
        """Put the kernel back; the slices that only a video would use become zero."""
        with torch.no_grad():
            target.weight.zero_()
            target.weight[:, :, -1] = self.weight
            target.bias.copy_(self.bias)


def flatten(vae: AutoencoderKLQwenImage) -> dict[str, FlatConv]:
    """Put flat convolutions in the place of all 3-D ones; returns them by their names, for `unflatten`."""
    names = [n for n, m in vae.named_modules() if isinstance(m, QwenImageCausalConv3d) and "time_conv" not in n]
    flat = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        flat[name] = FlatConv(vae.get_submodule(name))
        setattr(vae.get_submodule(parent), child, flat[name])
    return flat


def unflatten(vae: AutoencoderKLQwenImage, fresh: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """The weights of a flattened autoencoder in a fresh one of the same sizes."""
    flat = {name: module for name, module in vae.named_modules() if isinstance(module, FlatConv)}
    plain = {n: p for n, p in vae.state_dict().items() if n.rpartition(".")[0] not in flat}
    fresh.load_state_dict(plain, strict=False)
    for name, module in flat.items():
        module.write(fresh.get_submodule(name))
    return fresh


def channels_last(vae: AutoencoderKLQwenImage) -> None:
    """Lay the kernels of a flattened autoencoder out as tensor cores like them."""
    for parameter in vae.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def encode(vae: AutoencoderKLQwenImage, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logarithm of the variance of the latents of pictures (B, 3, H, W), each (B, z, h, w)."""
    moments = vae.quant_conv(vae.encoder(images.unsqueeze(2)))
    mean, logvar = moments.squeeze(2).chunk(2, dim=1)
    return mean, logvar.clamp(-12, 4)


def decode(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) of latents (B, z, h, w)."""
    out: Tensor = vae.decoder(vae.post_quant_conv(latents.unsqueeze(2))).squeeze(2)
    return out


def _edges(images: Tensor) -> tuple[Tensor, Tensor]:
    return images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]


@dataclass(frozen=True)
class Loss:
    """What the autoencoder is trained for."""

    kl_weight: float = 3e-5
    """Weight of the posterior's divergence from a unit Gaussian, per latent."""
    noise: float = 0.1
    """Most noise that is added to the latents, so that the decoder forgives the transformer's small errors."""
    decoder_only: bool = False
    """Leave the encoder as it is, so that a transformer trained on its latents stays right."""

    def __call__(self, vae: AutoencoderKLQwenImage, images: Tensor) -> Tensor:
        """The training loss on pictures (B, 3, H, W), -1..1."""
        with torch.set_grad_enabled(not self.decoder_only):
            mean, logvar = (part.float() for part in encode(vae, images))
        std = torch.rand(len(images), 1, 1, 1, device=images.device) * self.noise
        if not self.decoder_only:
            std = torch.maximum(torch.exp(0.5 * logvar), std)
        out = decode(vae, mean + std * torch.randn_like(mean)).float()
        error = (out - images).abs().mean()
        edges = sum((a - b).abs().mean() for a, b in zip(_edges(out), _edges(images), strict=True))
        loss = error + 0.5 * edges + (out - images).square().mean()
        if not self.decoder_only:
            loss = loss + self.kl_weight * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return loss


DEFAULT_LOSS = Loss()


def _scenes(source: ShardSource, device: str) -> tuple[Tensor, Tensor]:
    """All square scenes on the device: primitives and backgrounds."""
    shards = list(source.shards(FORMATS[0]))
    primitives = torch.from_numpy(np.concatenate([shard.primitives for shard in shards])).to(device)
    return primitives, torch.from_numpy(np.concatenate([shard.backgrounds for shard in shards])).to(device)


def _optimiser(vae: AutoencoderKLQwenImage, decoder_only: bool, muon_lr: float, adam_lr: float) -> Optimiser:
    """Muon for the kernels inside, AdamW for the first and last layers, biases and norms."""
    fixed = ("encoder.", "quant_conv.") if decoder_only else ()
    matrices, others = [], []
    for name, parameter in vae.named_parameters():
        if "time_conv" in name or name.startswith(fixed):
            continue
        inside = parameter.ndim == 4 and not any(end in name for end in ("conv_in", "conv_out", "quant_conv"))
        (matrices if inside else others).append(parameter)
    return Optimiser(matrices, others, muon_lr, adam_lr, 0.998)


def _loss(
    vae: AutoencoderKLQwenImage, scenes: tuple[Tensor, Tensor], batch: int, objective: Loss
) -> Callable[[], Tensor]:
    primitives, backgrounds = scenes
    device = primitives.device
    height, width = FORMATS[0]

    def loss() -> Tensor:
        rows = torch.randint(len(primitives), (batch,), device=device)
        images = draw(primitives[rows], backgrounds[rows], height, width, compiled=device.type == "cuda") * 2 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return objective(vae, images)

    return loss


@dataclass(frozen=True)
class VaeRecipe:
    """How to train the autoencoder."""

    seconds: float
    """Time of training, compilation excluded."""
    batch: int = 128
    """Pictures per step."""
    muon_lr: float = 0.02
    """Largest learning rate of the kernels."""
    adam_lr: float = 2e-3
    """Largest learning rate of the rest."""
    graphs: bool = False
    """Whether to record the steps as CUDA graphs."""
    deadline: float = float("inf")
    """When training ends at the latest, as time.monotonic counts."""


def train_vae(
    vae: AutoencoderKLQwenImage,
    source: ShardSource,
    recipe: VaeRecipe,
    device: str,
    objective: Loss = DEFAULT_LOSS,
) -> AutoencoderKLQwenImage:
    """Train for a time; returns a new autoencoder in the released layout.

    Args:
        vae: a new one, or one to go on with.
        source: where the scenes come from.
        recipe: sizes and rates.
        device: to train on.
        objective: the loss.
    """
    fresh = AutoencoderKLQwenImage.from_config(vae.config)
    flatten(vae)
    vae.to(device)
    if device.startswith("cuda"):
        channels_last(vae)
        vae.encoder.compile(dynamic=False)
        vae.decoder.compile(dynamic=False)
    begun = time.monotonic()
    loss = _loss(vae, _scenes(source, device), recipe.batch, objective)
    stepper = Stepper([loss], _optimiser(vae, objective.decoder_only, recipe.muon_lr, recipe.adam_lr))
    stepper.warm()
    if recipe.graphs:
        stepper.record()
    clock, step = Clock(recipe.seconds, warmup=100), 0
    clock.restart(recipe.deadline)
    print(f"vae: first steps took {time.monotonic() - begun:.0f} s", flush=True)
    while clock.share < 1:
        stepper.step(0, clock.scale())
        step += 1
        if step % 25 == 0:
            stepper.total.item()  # waits for the GPU, so that the clock is right
        if step % 250 == 0:
            loss_now = stepper.total.item() / 250
            print(f"vae {time.monotonic() - begun:.0f} s step {step} loss {loss_now:.4f}", flush=True)
            stepper.total.zero_()
    stepper.optimiser.average.install()
    print(f"vae: {step} steps of {recipe.batch}", flush=True)
    return unflatten(vae.cpu(), fresh)


@torch.no_grad()
def measure(vae: AutoencoderKLQwenImage, images: Tensor) -> tuple[list[float], list[float], float]:
    """Mean and deviation of every latent channel, and the peak signal-to-noise ratio of the pictures in dB."""
    latents = vae.encode(images.unsqueeze(2)).latent_dist.mode()
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    std = std.clamp(min=0.3 * std.mean().item())  # a channel that says nothing shall not be blown up
    error = (vae.decode(latents).sample.squeeze(2) - images).square().mean().item() / 4
    return mean.tolist(), std.tolist(), float(-10 * np.log10(error))


def save_vae(vae: AutoencoderKLQwenImage, images: Tensor, folder: Path, keep_scale: bool = False) -> None:
    """Measure the latents, write them into the configuration (unless keep_scale) and save the autoencoder (float32).

    The folder appears when it is complete: another process may wait for it.
    """
    mean, std, psnr = measure(vae, images)
    print(f"vae psnr {psnr:.2f} dB, latents' std {min(std):.2f} to {max(std):.2f}", flush=True)
    if not keep_scale:
        vae.register_to_config(latents_mean=mean, latents_std=std)
    partial = folder.with_name(folder.name + ".part")
    vae.save_pretrained(partial)
    partial.rename(folder)


def main() -> None:
    """Train the autoencoder and save it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    parser.add_argument("--start", type=Path, help="an autoencoder to go on with")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="fine")
    parser.add_argument("--decoder-only", action="store_true", help="leave the encoder and its latents as they are")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=100000)
    parser.add_argument("--seconds", type=float, default=100, help="of training, compilation excluded")
    parser.add_argument("--until", type=float, default=float("inf"), help="end the training by then (Unix time)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--graphs", action="store_true", help="record the steps as CUDA graphs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begun = time.monotonic()
    torch.manual_seed(args.seed)
    torch._dynamo.config.recompile_limit = 64
    recipe = VaeRecipe(
        args.seconds, args.batch, args.muon_lr, args.adam_lr, args.graphs, begun + args.until - time.time()
    )
    with ShardSource(2000003 * (args.seed + 1), TOKENIZER, args.workers, DETAIL_MIX) as source:
        source.order(FORMATS[0], args.samples, min(SHARD, max(args.samples // args.workers, 1)))
        vae = AutoencoderKLQwenImage.from_pretrained(args.start) if args.start else make_vae(LAYOUTS[args.layout])
        vae = train_vae(vae.float(), source, recipe, args.device, Loss(decoder_only=args.decoder_only))
        first = next(iter(source.shards(FORMATS[0])))
    images = pictures(first, slice(0, 256), FORMATS[0], args.device)
    save_vae(vae.to(args.device), images, args.out, keep_scale=args.decoder_only)


if __name__ == "__main__":
    main()
