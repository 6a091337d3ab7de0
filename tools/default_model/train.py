"""Trains everything and exports it: `python -m tools.default_model.train --out FOLDER`. See README.md."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tools.default_model.data import SHARD, TOKENIZER, ShardSource
from tools.default_model.export import export
from tools.default_model.models import LAYOUTS, Layout, encode_text, make_text_encoder, make_transformer
from tools.default_model.steps import Stepper
from tools.default_model.tokens import SPECIALS, TEMPLATE
from tools.default_model.train_model import (
    Pool,
    Recipe,
    Trainer,
    compile_blocks,
    fill_pools,
    make_stepper,
    train_model,
    trained_parameters,
    warm_drawing,
)
from tools.default_model.train_vae import channels_last, flatten
from tools.default_model.world import FORMATS

POOL_SHARES = (0.7, 0.15, 0.15)
"""Share of the samples for each canvas of FORMATS."""

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


def _read(folder: Path) -> dict[str, Tensor]:
    if (folder / "model_index.json").exists():
        transformer = QwenImageTransformer2DModel.from_pretrained(str(folder / "transformer"))
        text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(str(folder / "text_encoder"))
        parts = {"transformer": transformer.float(), "text_encoder": text_encoder.float()}
        return {f"{prefix}.{name}": t for prefix, part in parts.items() for name, t in part.state_dict().items()}
    paths = sorted(folder.glob("state-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"neither state-*.safetensors nor a checkpoint in {folder}")
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def load_state(folders: list[Path], modules: dict[str, nn.Module]) -> None:
    """Load what `save_state` wrote, or the weights of an exported checkpoint; of several folders the mean.

    Raises:
        FileNotFoundError: if there is neither in a folder.
        ValueError: if the weights are of other modules.
    """
    read = [_read(folder) for folder in folders]
    tensors = {name: torch.stack([state[name].float() for state in read]).mean(0) for name in read[0]}
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
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="fine")
    parser.add_argument("--vae", type=Path, required=True, help="the autoencoder, from tools.default_model.train_vae")
    parser.add_argument("--wait", type=float, default=0, help="seconds to wait for the autoencoder to appear")
    parser.add_argument(
        "--resume", type=Path, nargs="+", help="folders with a saved state or a checkpoint to go on from their mean"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--samples", type=int, default=1200000)
    parser.add_argument("--seconds", type=float, default=240, help="0: export what --resume holds")
    parser.add_argument("--until", type=float, default=float("inf"), help="end the training by then (Unix time)")
    parser.add_argument("--graphs", action="store_true", help="record training steps as CUDA graphs")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _numbers(args: argparse.Namespace) -> list[int]:
    return [max(int(args.samples * share), 1) for share in POOL_SHARES]


def _autoencoder(args: argparse.Namespace, begun: float) -> AutoencoderKLQwenImage:
    while not args.vae.exists() and time.monotonic() - begun < args.wait:
        time.sleep(0.5)
    return AutoencoderKLQwenImage.from_pretrained(args.vae).float()


def _fill(args: argparse.Namespace, pools: list[Pool], source: ShardSource, vae: AutoencoderKLQwenImage) -> None:
    flat = AutoencoderKLQwenImage.from_config(vae.config)
    flat.load_state_dict(vae.state_dict())
    flatten(flat)
    flat.to(args.device).eval()
    if args.device.startswith("cuda"):
        channels_last(flat)
    fill_pools(pools, flat, source, args.device)


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


def _stepper(
    args: argparse.Namespace,
    recipe: Recipe,
    text_encoder: Qwen2_5_VLForConditionalGeneration,
    transformer: QwenImageTransformer2DModel,
    pools: list[Pool],
    tokenizer: Qwen2Tokenizer,
) -> Stepper:
    transformer.to(args.device)
    text_encoder.to(args.device)
    check_text_encoder(text_encoder, tokenizer)
    if args.device.startswith("cuda"):
        compile_blocks(text_encoder, transformer)
    empty = [tokenizer(TEMPLATE.format(text)).input_ids for text in (" ", "")]
    trainer = Trainer(LAYOUTS[args.layout], text_encoder, transformer, pools, empty, args.device)
    return make_stepper(trainer, trained_parameters(text_encoder, transformer), recipe)


def _make_pools(args: argparse.Namespace, layout: Layout) -> list[Pool]:
    room = max(layout.patches(canvas) for canvas in FORMATS)
    return [Pool(number, room, layout.width, args.device) for number in _numbers(args)]


def main() -> None:
    """Train the text encoder and the transformer on the autoencoder's latents, and export all."""
    args = _arguments()
    begun = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch._dynamo.config.recompile_limit = 64
    layout = LAYOUTS[args.layout]
    recipe = Recipe(
        args.seconds,
        args.batch,
        args.muon_lr,
        args.adam_lr,
        graphs=args.graphs,
        deadline=begun + args.until - time.time(),
    )
    with ShardSource(1000003 * (args.seed + 1), TOKENIZER, args.workers) as source:
        if args.seconds > 0:
            for canvas, number in zip(FORMATS, _numbers(args), strict=True):
                source.order(canvas, number, min(SHARD, max(number // args.workers, 1)))
        tokenizer = Qwen2Tokenizer.from_pretrained(TOKENIZER)
        specials = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in SPECIALS}
        text_encoder, transformer = make_text_encoder(len(tokenizer), specials), make_transformer(layout)
        modules: dict[str, nn.Module] = {"transformer": transformer, "text_encoder": text_encoder}
        if args.resume:
            load_state(args.resume, modules)
        if args.seconds > 0:
            pools = _make_pools(args, layout)
            # before the autoencoder is there: compiling and recording need no real samples
            stepper = _stepper(args, recipe, text_encoder, transformer, pools, tokenizer)
            warm_drawing(source, args.device)
        vae = _autoencoder(args, begun)
        if args.seconds > 0:
            _fill(args, pools, source, vae)
    print(f"{time.monotonic() - begun:.0f} s: data is ready", flush=True)
    if args.seconds > 0:
        train_model(stepper, recipe, lambda: save_state(args.out, modules), args.seed)
    folder = args.export or args.out / "model"
    size = export(folder, layout, vae, transformer, text_encoder, TOKENIZER, specials)
    print(f"{time.monotonic() - begun:.0f} s: exported {size} bytes to {folder}", flush=True)


if __name__ == "__main__":
    main()
