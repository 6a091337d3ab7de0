"""Full-size checkpoint folders without weights: the released configuration files plus a tiny tokenizer.

Enough for ``diffusion_load_format="dummy"`` (random weights made on the device) and for building the reference pipeline
with random weights, so that speed at full size can be measured on a machine that has no released weights.
"""

import json
import shutil
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
            with torch.device("meta"):
                module = cls.from_config(cls.load_config(folder / name))
            parts[name] = _randomise(module, dtype, device)
        else:
            config = transformers.AutoConfig.from_pretrained(folder / name)
            config = getattr(config, "text_config", config) if class_name == "CLIPTextModel" else config
            with torch.device(device):
                previous = torch.get_default_dtype()
                torch.set_default_dtype(dtype)
                try:
                    parts[name] = cls(config).eval()
                finally:
                    torch.set_default_dtype(previous)
    pipeline_class = getattr(diffusers, index["_class_name"])
    extra = {"image_encoder": None, "feature_extractor": None} if index["_class_name"] == "FluxPipeline" else {}
    return pipeline_class(**parts, **extra)


def _randomise(module: Any, dtype: torch.dtype, device: str) -> Any:
    module = module.to_empty(device=device).to(dtype).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in module.named_parameters():
        if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, 0.02, generator=generator)
    for buffer in module.buffers():
        if buffer.is_floating_point() and not buffer.is_complex():
            buffer.data.zero_()
    return module
