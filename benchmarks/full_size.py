"""Full-size checkpoint folders without weights: the released configuration files plus a tiny tokenizer.

Enough for ``diffusion_load_format="dummy"`` (random weights made on the device) and for building the reference pipeline
with random weights, so that speed at full size can be measured on a machine that has no released weights.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LAYOUTS = Path(__file__).parent / "layouts"


def write_layout(family: str, folder: Path) -> Path:
    """Write the full-size layout of ``family`` (flux, qwen-image) into ``folder``; tokenizers are tiny ones."""
    from vllm_omni.diffusion.tiny_models import make_tiny_model

    make_tiny_model(family, folder)
    for weights in folder.rglob("*.safetensors*"):
        weights.unlink()
    shutil.copytree(LAYOUTS / family, folder, dirs_exist_ok=True)
    return folder


def reference_pipeline(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """diffusers' pipeline of a layout folder with random weights, made on the device.

    Normal weights of standard deviation 0.02 keep activations finite in bfloat16; norms keep their initial ones.
    """
    import diffusers
    import transformers

    index = json.loads((folder / "model_index.json").read_text())
    parts: dict[str, Any] = {}
    for name, (library, class_name) in ((k, v) for k, v in index.items() if not k.startswith("_")):
        cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
        if "tokenizer" in name or name == "scheduler":
            parts[name] = cls.from_pretrained(folder / name)
        elif library == "diffusers":
            # On the device and not on "meta": Qwen-Image's rotary tables are plain attributes, made by the constructor.
            config = cls.load_config(folder / name)
            parts[name] = _randomise(_build(lambda cls=cls, config=config: cls.from_config(config), dtype, device))
        else:
            config = transformers.AutoConfig.from_pretrained(folder / name)
            config = config.text_config if class_name == "CLIPTextModel" and "text_config" in config else config
            parts[name] = _build(lambda cls=cls, config=config: cls(config), dtype, device)
    pipeline_class = getattr(diffusers, index["_class_name"])
    extra = {"image_encoder": None, "feature_extractor": None} if index["_class_name"] == "FluxPipeline" else {}
    return pipeline_class(**parts, **extra)


def _build(make: Callable[[], Any], dtype: torch.dtype, device: str) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make().eval().requires_grad_(False).to(dtype)
    finally:
        torch.set_default_dtype(before)


def _randomise(module: Any) -> Any:
    generator = torch.Generator(next(module.parameters()).device).manual_seed(0)
    for name, parameter in module.named_parameters():
        if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    return module
