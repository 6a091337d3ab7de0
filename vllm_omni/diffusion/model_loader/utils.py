"""Find, fetch and read weight files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_omni.diffusion.utils.checkpoint import model_folder
from vllm_omni.errors import ConfigError

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


def download_weights_from_hf_specific(
    model_name_or_path: str, cache_dir: str | None, allow_patterns: Sequence[str], revision: str | None = None
) -> str:
    """Fetch the files of a hub checkpoint that match ``allow_patterns`` and return their folder.

    Raises:
        ConfigError: the checkpoint cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(
            model_name_or_path, cache_dir=cache_dir, allow_patterns=list(allow_patterns), revision=revision
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"model={model_name_or_path!r} cannot be fetched: {error}", field="model") from error


def weight_files(model_or_path: str, subfolder: str | None, revision: str | None, fall_back_to_pt: bool) -> list[Path]:
    """The weight files of one component: those of its index, else its one file, safetensors before pickles.

    Raises:
        ConfigError: there are none, or the index names a file that is not there.
    """
    folder = model_folder(model_or_path, revision) / (subfolder or "")
    kinds = [".safetensors", *([".bin"] if fall_back_to_pt else [])]
    for kind in kinds:
        for stem in _STEMS:
            index = folder / f"{stem}{kind}.index.json"
            if index.is_file():
                return _indexed(index)
            if (folder / f"{stem}{kind}").is_file():
                return [folder / f"{stem}{kind}"]
        loose = sorted(folder.glob(f"*{kind}"))
        if loose:
            return loose
    raise ConfigError(f"{folder}: no weight files ({' or '.join('*' + kind for kind in kinds)})", field="model")


def _indexed(index: Path) -> list[Path]:
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ConfigError(f"{index}: names files that are not there: {', '.join(missing)}", field="model")
    return [index.parent / name for name in names]


def iterate_weights(files: Sequence[Path], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every entry, each read straight to ``device`` from the mapped file when its turn comes.

    Raises:
        ConfigError: a file is damaged, or a name occurs twice.
    """
    seen: set[str] = set()
    for path in files:
        for name, tensor in _entries(path, device):
            if name in seen:
                raise ConfigError(f"{path}: tensor {name} occurs twice in the checkpoint", field="model")
            seen.add(name)
            yield name, tensor


def _entries(path: Path, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    if path.suffix == ".bin":
        yield from torch.load(path, map_location=device, mmap=True, weights_only=True).items()
        return
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ConfigError(f"{path}: damaged safetensors file: {error}", field="model") from error
