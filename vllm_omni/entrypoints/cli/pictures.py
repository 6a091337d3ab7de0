"""Files that ``generate`` writes: names, formats, and the text chunks of a PNG that let it be made again."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_omni.errors import RequestError
from vllm_omni.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

SLUG_CHARACTERS = 40
SUFFIXES = {"pil": ".png", "np": ".npy", "pt": ".safetensors", "latent": ".safetensors"}
"""Suffix of a file by ``output_type``."""


@dataclass(frozen=True)
class Recipe:
    """Everything that made a picture, as the text chunks of its PNG hold it."""

    prompt: str
    """The text."""
    negative_prompt: str | None
    """What the picture should not show."""
    model: str | None
    """The checkpoint as the user named it."""
    seed: int | None = None
    """The seed that was used, drawn or given."""
    sampling_params: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters, the given ones and those that the model decided."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``Omni`` that were given, the model among them."""
    index: int = 0
    """Number of the picture among those of its prompt."""
    version: str = __version__
    """Version of the package."""

    def chunks(self) -> dict[str, str]:
        """Text chunks: what people look for by name, and all of it as JSON."""
        chunks = {"Software": f"vllm-omni {self.version}", "prompt": self.prompt}
        for name in ("negative_prompt", "model", "seed"):
            value = getattr(self, name)
            if value is not None:
                chunks[name] = str(value)
        return {**chunks, "vllm-omni": json.dumps(vars(self), ensure_ascii=False, default=dict)}


def read_recipe(path: Path) -> Recipe:
    """The recipe in a PNG that ``generate`` wrote.

    Raises:
        RequestError: the file is no picture, or was not written by ``generate``.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()  # text chunks may stand behind the pixels
            text = image.info.get("vllm-omni")
    except UnidentifiedImageError as error:
        raise RequestError(f"{path} is not a picture", field="from_png") from error
    if not isinstance(text, str):
        raise RequestError(f"{path} holds no parameters; only PNG files of 'vllm-omni generate' do", field="from_png")
    values = json.loads(text)
    unknown = sorted(set(values) - set(Recipe.__dataclass_fields__))
    if unknown:
        raise RequestError(f"{path} was written by version {values.get('version')} and holds {unknown}, unknown here")
    return Recipe(**values)


def save_png(image: "Image", path: Path, recipe: Recipe) -> None:
    """Write a picture with its recipe; the file appears whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in recipe.chunks().items():
        info.add_itxt(name, text)
    part = path.with_name(path.name + ".part")
    try:
        image.save(part, "PNG", pnginfo=info)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Write tensors as safetensors."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def save_array(array: Any, path: Path) -> None:
    """Write an array as numpy's own format."""
    import numpy

    numpy.save(path, array)


def slug(prompt: str) -> str:
    """A file name of a prompt: ``a-cup-of-coffee``."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-_")
    return words[:SLUG_CHARACTERS].rstrip("-_") or "picture"


def free_path(path: Path) -> Path:
    """``path``, or with a number behind its stem when the file exists: nothing is overwritten."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate
