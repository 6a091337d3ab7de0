"""Trains everything and exports it: `python -m tools.default_model.train --out FOLDER`. See README.md."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tools.default_model.data import SHARD, ShardSource, pictures
from tools.default_model.export import export
from tools.default_model.models import encode_text, make_text_encoder, make_transformer, make_vae
from tools.default_model.tokens import SPECIALS, TEMPLATE
from tools.default_model.train_model import (
    Pool,
    Recipe,
    Trainer,
    compile_blocks,
    make_pools,
    train_model,
    trained_parameters,
)
from tools.default_model.train_vae import Loss, channels_last, flatten, save_vae, train_vae
from tools.default_model.world import FORMATS

LARGEST_FILE = 15 * 2**20
"""Bytes per file of a saved training state."""


def save_state(folder: Path, modules: dict[str, nn.Module]) -> None:
    """Save the modules' weights in float32 as state-0.safetensors, state-1.safetensors and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, Any]] = [{}]
    size = 0
    for prefix, module in modules.items():
        for name, tensor in module.state_dict().items():
            if name == "lm_head.weight" or "visual." in name:
                continue
            size += tensor.numel() * 4
            if size > LARGEST_FILE:
                files.append({})
                size = tensor.numel() * 4
            files[-1][f"{prefix}.{name}"] = tensor.detach().float().cpu().contiguous().clone()
    for index, tensors in enumerate(files):
        partial = folder / f"state-{index}.part"
        save_file(tensors, partial)
        partial.rename(folder / f"state-{index}.safetensors")


def load_state(folder: Path, modules: dict[str, nn.Module]) -> None:
    """Load what `save_state` wrote, or the weights of an exported checkpoint.

    Raises:
        FileNotFoundError: if there is neither in the folder.
    """
    if (folder / "model_index.json").exists():
        transformer = QwenImageTransformer2DModel.from_pretrained(str(folder / "transformer"))
        text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(str(folder / "text_encoder"))
        modules["transformer"].load_state_dict(transformer.float().state_dict())
        modules["text_encoder"].load_state_dict(text_encoder.float().state_dict())
        return
    paths = sorted(folder.glob("state-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no state-*.safetensors in {folder}")
    tensors = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    for prefix, module in modules.items():
        own = {name.removeprefix(prefix + "."): t for name, t in tensors.items() if name.startswith(prefix + ".")}
        missing, unknown = module.load_state_dict(own, strict=False)
        left = [name for name in missing if name != "lm_head.weight" and "visual." not in name]
        if left or unknown:
            raise ValueError(f"state does not fit {prefix}: missing {left}, unknown {unknown}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the checkpoint")
    parser.add_argument("--export", type=Path, help="folder of the exported checkpoint (default: OUT/model)")
    parser.add_argument("--tokenizer", type=Path, default=Path("vllm_omni/data/default_model/tokenizer"))
    parser.add_argument("--vae", type=Path, help="an autoencoder to start from")
    parser.add_argument("--resume", type=Path, help="folder with a saved state to go on from")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--samples", type=int, default=600000)
    parser.add_argument("--vae-samples", type=int, default=60000)
    parser.add_argument("--vae-seconds", type=float, default=75, help="0: take --vae as it is")
    parser.add_argument("--decoder-only", action="store_true", help="leave the encoder and its latents as they are")
    parser.add_argument("--vae-batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=240, help="0: export what --resume holds")
    parser.add_argument("--graphs", action="store_true", help="record training steps as CUDA graphs")
    parser.add_argument("--total-seconds", type=float, default=float("inf"), help="end the training by then")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _order(args: argparse.Namespace, source: ShardSource) -> None:
    if args.vae_seconds > 0:
        source.order(FORMATS[0], args.vae_samples, min(SHARD, max(args.vae_samples // 6, 1)))
    if args.seconds <= 0:
        return
    shard = min(SHARD, max(args.samples // 16, 1))
    for canvas, share in zip(FORMATS, (0.7, 0.15, 0.15), strict=True):
        source.order(canvas, int(args.samples * share), shard)


def _autoencoder(args: argparse.Namespace, source: ShardSource) -> AutoencoderKLQwenImage:
    vae = AutoencoderKLQwenImage.from_pretrained(args.vae) if args.vae else make_vae()
    if args.vae_seconds <= 0:
        return vae
    vae = train_vae(
        vae, source, args.vae_seconds, args.vae_batch, args.device, objective=Loss(decoder_only=args.decoder_only)
    )
    first = next(iter(source.shards(FORMATS[0])))
    images = pictures(first, slice(0, 256), FORMATS[0], args.device)
    return save_vae(vae.to(args.device), images, args.out / "vae", keep_scale=args.decoder_only).cpu()


def _pools(args: argparse.Namespace, source: ShardSource, vae: AutoencoderKLQwenImage) -> Any:
    flat = AutoencoderKLQwenImage.from_config(vae.config)
    flat.load_state_dict(vae.state_dict())
    flatten(flat)
    flat.to(args.device).eval()
    if args.device.startswith("cuda"):
        channels_last(flat)
    return make_pools(flat, source, args.device)


@torch.no_grad()
def check_text_encoder(text_encoder: nn.Module, tokenizer: Qwen2Tokenizer) -> None:
    """Make sure that the short forward of training is what the pipeline will compute.

    Raises:
        RuntimeError: if it is not.
    """
    ids = torch.tensor([tokenizer(TEMPLATE.format("a red circle")).input_ids], device=text_encoder.device)
    full = text_encoder(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    difference = (encode_text(text_encoder, ids) - full.hidden_states[-1]).abs().max().item()
    if difference > 1e-2:
        raise RuntimeError(f"the text encoder's short forward differs by {difference}")


def _train(
    args: argparse.Namespace,
    text_encoder: Qwen2_5_VLForConditionalGeneration,
    transformer: QwenImageTransformer2DModel,
    pools: list[Pool],
    tokenizer: Qwen2Tokenizer,
    begun: float,
) -> None:
    transformer.to(args.device)
    text_encoder.to(args.device)
    check_text_encoder(text_encoder, tokenizer)
    if args.device.startswith("cuda"):
        compile_blocks(text_encoder, transformer)
    empty = [tokenizer(TEMPLATE.format(text)).input_ids for text in (" ", "")]
    trainer = Trainer(text_encoder, transformer, pools, empty, args.device)
    deadline = begun + args.total_seconds
    recipe = Recipe(args.seconds, args.batch, args.muon_lr, args.adam_lr, graphs=args.graphs, deadline=deadline)
    modules: dict[str, nn.Module] = {"transformer": transformer, "text_encoder": text_encoder}
    named = trained_parameters(text_encoder, transformer)
    train_model(trainer, named, recipe, lambda: save_state(args.out, modules), args.seed)


def main() -> None:
    """Train the autoencoder, the text encoder and the transformer, and export them."""
    args = _arguments()
    begun = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch._dynamo.config.recompile_limit = 64
    with ShardSource(1000003 * (args.seed + 1), args.tokenizer, args.workers) as source:
        _order(args, source)
        tokenizer = Qwen2Tokenizer.from_pretrained(args.tokenizer)
        specials = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in SPECIALS}
        text_encoder, transformer = make_text_encoder(len(tokenizer), specials), make_transformer()
        modules: dict[str, nn.Module] = {"transformer": transformer, "text_encoder": text_encoder}
        if args.resume:
            load_state(args.resume, modules)
        vae = _autoencoder(args, source)
        pools = _pools(args, source, vae) if args.seconds > 0 else []
    print(f"{time.monotonic() - begun:.0f} s: data is ready", flush=True)
    if args.seconds > 0:
        _train(args, text_encoder, transformer, pools, tokenizer, begun)
    folder = args.export or args.out / "model"
    size = export(folder, vae, transformer, text_encoder, args.tokenizer, specials)
    print(f"{time.monotonic() - begun:.0f} s: exported {size} bytes to {folder}", flush=True)


if __name__ == "__main__":
    main()
