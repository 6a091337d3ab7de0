"""``vllm-omni tiny-model``: a tiny random checkpoint in the released layout."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_omni.entrypoints.cli.flags import unwrapped
from vllm_omni.errors import RequestError


def tiny_model(
    family: Annotated[str, typer.Argument(help="Model family, such as flux or qwen3-omni; an unknown one lists all.")],
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint goes; must be empty or not exist.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Write a tiny random checkpoint in the released layout.

    It has the files, names and shapes of a released checkpoint, and draws or speaks noise: it is for tests, for trying
    the commands, and for people who add a model. A model of several stages comes with the stages.yaml to run it with.
    """
    from vllm_omni.diffusion.tiny_models import FAMILIES as PICTURES
    from vllm_omni.model_executor.tiny_models import FAMILIES as OMNI

    if family not in (*PICTURES, *OMNI):
        raise RequestError(f"no family {family!r}; there are {', '.join((*PICTURES, *OMNI))}", field="family")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{folder} is not an empty folder", field="folder")
    write_tiny_model(family, folder, seed)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    typer.echo(f"{folder}: tiny random {family} checkpoint, {size / 1e6:.1f} MB")
    if family in OMNI:
        typer.echo(f"run it with --stage-configs-path {folder / 'stages.yaml'}")


def write_tiny_model(family: str, folder: Path, seed: int) -> None:
    """The makers of checkpoints without the progress bars of the libraries that write the files."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from vllm_omni.diffusion.tiny_models import FAMILIES, make_tiny_model
    from vllm_omni.model_executor.tiny_models import make_tiny_omni

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if family in FAMILIES:
        make_tiny_model(family, folder, seed=seed)
    else:
        make_tiny_omni(family, folder, seed=seed)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("tiny-model", help=unwrapped(tiny_model.__doc__ or ""))(tiny_model)
