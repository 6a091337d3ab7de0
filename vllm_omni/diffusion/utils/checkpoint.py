"""Find and read the files of a checkpoint in the diffusers layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError


def model_folder(model: str, revision: str | None = None) -> Path:
    """Folder of the checkpoint ``model``: a local folder, or a hub name that the local hub cache holds.

    Nothing is downloaded here (see ``model_loader.utils`` for that).

    Raises:
        ConfigError: neither a folder nor in the cache.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model={model!r}: neither a folder nor a checkpoint in the local hub cache"
            + (f" at revision {revision!r}" if revision else "")
            + "; give the path of a folder, or fetch it first with `hf download`",
            field="model",
        ) from error


def read_config(folder: Path, *parts: str) -> dict[str, Any]:
    """The JSON object in ``folder/parts...``.

    Raises:
        ConfigError: no such file, or no JSON object in it.
    """
    path = folder.joinpath(*parts)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"checkpoint {folder}: {'/'.join(parts)} is missing", field="model") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}", field="model") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object", field="model")
    return data


def model_class_name(folder: Path) -> str:
    """``_class_name`` of the checkpoint's model_index.json.

    Raises:
        ConfigError: the file or the key is missing.
    """
    name = read_config(folder, "model_index.json").get("_class_name")
    if not isinstance(name, str):
        raise ConfigError(f"{folder}/model_index.json has no _class_name; set model_class_name", field="model")
    return name
