"""Trains the autoencoder. A picture is one frame, so its 3-D convolutions are trained as the 2-D ones they then are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn
from torch.nn import functional

from tools.default_model.data import ShardSource
from tools.default_model.optimiser import Average, Clock
from tools.default_model.shapes import draw
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
    """Mean and logarithm of the variance of the latents of pictures (B, 3, H, W), each (B, z, H/8, W/8)."""
    moments = vae.quant_conv(vae.encoder(images.unsqueeze(2)))
    mean, logvar = moments.squeeze(2).chunk(2, dim=1)
    return mean, logvar.clamp(-12, 4)


def decode(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) of latents (B, z, H/8, W/8)."""
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

    def __call__(self, vae: AutoencoderKLQwenImage, images: Tensor) -> tuple[Tensor, Tensor]:
        """The training loss and the plain absolute error of pictures (B, 3, H, W), -1..1."""
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
        return loss, error


DEFAULT_LOSS = Loss()


def _scenes(source: ShardSource, device: str) -> tuple[Tensor, Tensor]:
    """All square scenes on the device: primitives and backgrounds."""
    shards = list(source.shards(FORMATS[0]))
    primitives = torch.from_numpy(np.concatenate([shard.primitives for shard in shards])).to(device)
    return primitives, torch.from_numpy(np.concatenate([shard.backgrounds for shard in shards])).to(device)


def train_vae(
    vae: AutoencoderKLQwenImage,
    source: ShardSource,
    seconds: float,
    batch: int,
    device: str,
    lr: float = 2e-3,
    objective: Loss = DEFAULT_LOSS,
) -> AutoencoderKLQwenImage:
    """Train for a time; returns a new autoencoder in the released layout.

    Args:
        vae: a new one, or one to go on with.
        source: where the scenes come from.
        seconds: time of training, compilation excluded.
        batch: pictures per step.
        device: to train on.
        lr: largest learning rate.
        objective: the loss.
    """
    fresh = AutoencoderKLQwenImage.from_config(vae.config)
    flatten(vae)
    cuda = device.startswith("cuda")
    vae.to(device)
    if cuda:
        channels_last(vae)
        vae.encoder.compile(dynamic=False)
        vae.decoder.compile(dynamic=False)
    fixed = ("encoder.", "quant_conv.") if objective.decoder_only else ()
    parameters = [p for n, p in vae.named_parameters() if "time_conv" not in n and not n.startswith(fixed)]
    adam = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda)
    average = Average(parameters, 0.998)
    primitives, backgrounds = _scenes(source, device)
    clock, begun, step = Clock(seconds, warmup=60), time.monotonic(), 0
    while clock.share < 1 or step < 4:
        step += 1
        if step == 4:
            clock.restart()
        rows = torch.randint(len(primitives), (batch,), device=device)
        images = draw(primitives[rows], backgrounds[rows], *FORMATS[0], compiled=cuda) * 2 - 1
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=cuda):
            loss, error = objective(vae, images)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.param_groups[0]["lr"] = lr * clock.scale()
        adam.step()
        average.update()
        if step % 200 == 0 or step in (1, 3):
            print(f"vae {time.monotonic() - begun:.0f} s step {step} loss {loss:.4f} error {error:.4f}", flush=True)
    average.install()
    return unflatten(vae.cpu(), fresh)


@torch.no_grad()
def measure(vae: AutoencoderKLQwenImage, images: Tensor) -> tuple[list[float], list[float], float]:
    """Mean and deviation of every latent channel, and the peak signal-to-noise ratio of the pictures in dB."""
    latents = vae.encode(images.unsqueeze(2)).latent_dist.mode()
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    std = std.clamp(min=0.3 * std.mean().item())  # a channel that says nothing shall not be blown up
    error = (vae.decode(latents).sample.squeeze(2) - images).square().mean().item() / 4
    return mean.tolist(), std.tolist(), float(-10 * np.log10(error))


def save_vae(
    vae: AutoencoderKLQwenImage, images: Tensor, folder: Path, keep_scale: bool = False
) -> AutoencoderKLQwenImage:
    """Measure the latents, write them into the configuration (unless keep_scale) and save the autoencoder (float32)."""
    mean, std, psnr = measure(vae, images)
    print(f"vae psnr {psnr:.2f} dB, latents' std {min(std):.2f} to {max(std):.2f}", flush=True)
    if not keep_scale:
        vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(folder)
    return vae
