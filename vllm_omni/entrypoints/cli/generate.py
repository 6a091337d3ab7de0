"""``vllm-omni generate``: prompts in, picture files out."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_omni.entrypoints.cli import pictures, terminal
from vllm_omni.entrypoints.cli.flags import with_flags
from vllm_omni.entrypoints.cli.groups import OMNI_GROUPS, SAMPLING, omni_arguments
from vllm_omni.entrypoints.cli.pictures import Recipe
from vllm_omni.entrypoints.cli.progress import GenerationProgress
from vllm_omni.entrypoints.cli.prompts import BadRow, PromptRow, read_rows
from vllm_omni.errors import ConfigError, OmniError, RequestError, StageDeadError, StageError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniSamplingParams
from vllm_omni.request import check_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from vllm_omni.entrypoints.async_omni import AsyncOmni
    from vllm_omni.outputs import OmniRequestOutput

MAX_OPEN = 256
"""Requests handed to the engine at once; the rest of a long file waits here."""


@dataclass(frozen=True)
class Job:
    """One prompt with its checked parameters."""

    row: PromptRow
    given: Mapping[str, Any]
    """Sampling parameters that were set, by the row or by options."""

    def sampling_params(self, defaults: Sequence[OmniSamplingParams]) -> list[OmniSamplingParams]:
        """One set a stage: what was given, over the stage's own in diffusion stages."""
        return [
            replace(params, **self.given) if isinstance(params, OmniDiffusionSamplingParams) else params
            for params in defaults
        ]


@dataclass(frozen=True)
class Destination:
    """Where files go."""

    output: Path | None
    output_dir: Path
    several_rows: bool

    def path(self, row: PromptRow, index: int, count: int, suffix: str) -> Path:
        """File of picture ``index`` of ``count`` of a prompt; a file that the user named is overwritten, others not."""
        number = f"-{index + 1}" if count > 1 else ""
        if self.output is not None:
            return self.output.with_stem(self.output.stem + number)
        if row.output is not None:
            named = self.output_dir / row.output
            return named.with_stem(named.stem + number)
        line = f"{row.line:05d}-" if self.several_rows else ""
        return pictures.free_path(self.output_dir / f"{line}{pictures.slug(row.prompt)}{number}{suffix}")


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(help="File with one prompt a line; .jsonl: an object a line, with parameters; - reads stdin."),
    ] = None,
    from_png: Annotated[
        Path | None, typer.Option(help="A PNG that this command wrote: draw it again; options given beside it win.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the picture should not show.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write, for one prompt.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for files that are not named.")] = Path("outputs"),
    show: Annotated[bool, typer.Option("--show", help="Draw the pictures in the terminal at the end.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    **flags: Any,
) -> None:
    """Make pictures from prompts.

    Files are named after the prompt and go to outputs/; each PNG holds everything that made it. Ctrl-C keeps what is
    finished. The status is 0 when every prompt gave its picture, 1 when one failed, 2 for wrong arguments.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the bars say what the log would
    sampling, arguments = SAMPLING.given(flags), omni_arguments(flags)
    if sum(source is not None for source in (prompt, prompts_file, from_png)) != 1:
        raise RequestError("give a prompt, --prompts-file or --from-png, and only one of them", field="prompt")
    if from_png is not None:
        row, sampling, arguments = _recipe(pictures.read_recipe(from_png), negative_prompt, sampling, arguments)
        rows: Iterable[PromptRow | BadRow] = [row]
    elif prompts_file is not None:
        rows = [_with_negative(row, negative_prompt) for row in read_rows(prompts_file)]
    else:
        assert prompt is not None
        rows = [PromptRow(0, prompt, negative_prompt)]
    rows = list(rows)
    if output is not None and len(rows) > 1:
        raise RequestError(f"--output names one file, and there are {len(rows)} prompts; use --output-dir")

    if not {"model", "stage_configs_path"} & arguments.keys() and not quiet:
        typer.echo("no --model: drawing with the tiny one of the package, which knows simple shapes", err=True)
    progress = GenerationProgress(len(rows), enabled=not quiet and sys.stderr.isatty())
    jobs, bad = _check(rows, sampling, output, progress)
    if not rows:
        raise RequestError(f"{prompts_file} holds no prompt", field="prompts_file")
    drawing = _Drawing(arguments, Destination(output, output_dir, len(rows) > 1), show, progress)
    failed = bad + (drawing.run(jobs) if jobs else 0)
    if failed:
        raise typer.Exit(1)


def _recipe(
    recipe: Recipe, negative_prompt: str | None, sampling: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[PromptRow, dict[str, Any], dict[str, Any]]:
    """What a PNG was made of, with the command line's options over it."""
    negative = recipe.negative_prompt if negative_prompt is None else negative_prompt
    return (
        PromptRow(0, recipe.prompt, negative),
        {**recipe.sampling_params, "seed": recipe.seed, **sampling},
        {**recipe.engine_args, **arguments},
    )


def _with_negative(row: PromptRow | BadRow, negative_prompt: str | None) -> PromptRow | BadRow:
    if isinstance(row, BadRow) or row.negative_prompt is not None or negative_prompt is None:
        return row
    return PromptRow(row.line, row.prompt, negative_prompt, row.output, row.overrides)


def _check(
    rows: Iterable[PromptRow | BadRow], sampling: Mapping[str, Any], output: Path | None, progress: GenerationProgress
) -> tuple[list[Job], int]:
    """The rows that can be drawn, and how many cannot (reported).

    Raises:
        RequestError: the only row, which stands on the command line, is wrong.
    """
    jobs, bad = [], 0
    for row in rows:
        try:
            if isinstance(row, BadRow):
                raise row.error
            check_prompt(row.as_prompt())
            _check_suffix(output or row.output, row.sampling_params(sampling).output_type)
            jobs.append(Job(row, {**sampling, **row.overrides}))
        except RequestError as error:
            if row.line == 0:
                raise
            bad += 1
            progress.say(f"line {row.line}: {error}", error=True)
    return jobs, bad


def _check_suffix(name: str | Path | None, output_type: str) -> None:
    wanted = pictures.SUFFIXES[output_type]
    if name is not None and Path(name).suffix != wanted:
        raise RequestError(f"output={str(name)!r}: output_type={output_type!r} is written as {wanted}", field="output")


class _Drawing:
    """Draws jobs and writes their files."""

    def __init__(
        self, arguments: Mapping[str, Any], destination: Destination, show: bool, progress: GenerationProgress
    ) -> None:
        self._arguments = arguments
        self._destination = destination
        self._show = show
        self._progress = progress
        self._to_show: list[tuple[Path, Image]] = []

    def run(self, jobs: list[Job]) -> int:
        """Draw all; returns how many failed (reported)."""
        from vllm_omni.entrypoints.async_omni import AsyncOmni

        with self._progress.loading("starting"):
            omni = AsyncOmni(**self._arguments)
        failed = asyncio.run(self._draw_all(omni, jobs))
        for path, image in self._to_show:  # not before the bars are gone: both would move the cursor
            print(f"\n{path}")
            terminal.show(image, sys.stdout)
        return failed

    async def _draw_all(self, omni: AsyncOmni, jobs: list[Job]) -> int:
        places = asyncio.Semaphore(MAX_OPEN)
        try:
            with self._progress.drawing():
                async with omni, asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._draw(omni, job, places)) for job in jobs]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None  # a stage is dead, and every request says so
        return sum(task.result() for task in tasks)

    async def _draw(self, omni: AsyncOmni, job: Job, places: asyncio.Semaphore) -> int:
        """Draw one; returns 1 when it failed."""
        row, name = job.row, str(job.row.line)

        def on_progress(stage_id: int, step: int, total: int) -> None:
            self._progress.step(name, row.prompt, step, total)

        async with places:
            try:
                params = job.sampling_params(omni.default_sampling_params_list)
                async for out in omni.generate(row.as_prompt(), name, params, on_progress=on_progress):
                    self._write(job, out)
            except StageDeadError:
                raise
            except OSError as error:
                raise ConfigError(f"output cannot be written: {error}", field="output") from error
            except OmniError as error:
                if row.line == 0:
                    raise
                self._progress.say(f"line {row.line}: {error}", error=True)
                return 1
            finally:
                self._progress.done(name)
        return 0

    def _write(self, job: Job, out: OmniRequestOutput) -> None:
        """Write the files of one output.

        Raises:
            StageError: the model made something else than pictures.
        """
        form = job.given.get("output_type", "pil")
        things = [out.latents] if form == "latent" else out.images
        if not things:
            raise StageError(f"the model made {out.final_output_type}, and generate writes pictures")
        for index, thing in enumerate(things):
            path = self._destination.path(job.row, index, len(things), pictures.SUFFIXES[form])
            path.parent.mkdir(parents=True, exist_ok=True)
            if form == "pil":
                pictures.save_png(thing, path, self._recipe(job, out, index))
            elif form == "np":
                pictures.save_array(thing, path)
            else:
                pictures.save_tensors({"latents" if form == "latent" else "image": thing}, path)
            self._progress.say(str(path))
            if self._show and form == "pil":
                self._to_show.append((path, thing))
        if job.given.get("return_trajectory_latents") and form != "latent":
            path = path.with_suffix(".trajectory.safetensors")
            pictures.save_tensors({"latents": out.latents, "timesteps": out.metrics["trajectory_timesteps"]}, path)
            self._progress.say(str(path))

    def _recipe(self, job: Job, out: OmniRequestOutput, index: int) -> Recipe:
        """What made picture ``index`` of ``out``: what was given, and what the model decided."""
        image, metrics = out.images[index], out.metrics
        decided = {"width": image.width, "height": image.height}
        if "sigmas" not in job.given:
            decided["num_inference_steps"] = metrics.get("num_inference_steps")
        known = {name: value for name, value in decided.items() if value is not None}
        given = {name: value for name, value in job.given.items() if name != "seed"}
        return Recipe(
            prompt=job.row.prompt,
            negative_prompt=job.row.negative_prompt,
            model=self._arguments.get("model"),
            seed=metrics.get("seed"),
            sampling_params={**known, **given},
            engine_args=self._arguments,
            index=index,
        )


COMMAND = with_flags(generate, SAMPLING, *OMNI_GROUPS)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate")(COMMAND)
