"""Entry of ``vllm-omni``.

Only the command that is asked for is imported, so that ``--version`` and ``--help`` answer at once. Every error leaves
as one line on stderr: status 2 for bad input, 1 for a failure, 130 for Ctrl-C.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from vllm_omni.errors import ConfigError, OmniError, RequestError
from vllm_omni.version import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("vllm_omni.entrypoints.cli.generate", "Make pictures from prompts."),
    "serve": ("vllm_omni.entrypoints.cli.serve", "Serve a model over HTTP, as OpenAI's clients expect it."),
    "bench": ("vllm_omni.entrypoints.cli.bench", "Measure a running server."),
    "config": ("vllm_omni.entrypoints.cli.config", "Show settings and where they come from."),
    "models": ("vllm_omni.entrypoints.cli.models", "List the supported models with their features and defaults."),
    "tiny-model": ("vllm_omni.entrypoints.cli.tiny_model", "Write a tiny random checkpoint in the released layout."),
}
"""Command -> (module, first line of its help). A module has ``register(app)``; a test compares the help lines."""

USAGE_STATUS = 2
FAILURE_STATUS = 1
INTERRUPTED_STATUS = 130
BAD_INPUT = (typer.TyperException, ConfigError, RequestError, FileNotFoundError)


def _not_loaded() -> None:
    raise AssertionError("a command that was not asked for ran")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-omni {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the Python traceback of an error (works behind a command too).")
    ] = False,
) -> None:
    """Serve models that read and make text, images, audio and video, as a graph of stages."""


def build_app(wanted: str | None) -> typer.Typer:
    """The application with the command ``wanted`` loaded; the other commands only stand in the list of ``--help``."""
    app = typer.Typer(
        name="vllm-omni",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    for name, (module, line) in COMMANDS.items():
        if name == wanted:
            importlib.import_module(module).register(app)
        else:
            app.command(name, help=line)(_not_loaded)
    return app


def _message(error: Exception) -> str:
    """The line for stderr, with its end."""
    if isinstance(error, typer.TyperException):
        text = error.format_message()
        if not text:  # a group without its command, whose help has been printed
            return ""
    elif isinstance(error, (OmniError, OSError)):
        text = str(error)
    else:
        text = f"unexpected {type(error).__name__}: {error} (--traceback shows where)"
    return "vllm-omni: " + " ".join(text.split()) + "\n"


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit status."""
    show_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        status = int(build_app(wanted)(arguments or ["--help"], prog_name="vllm-omni", standalone_mode=False) or 0)
        if status == INTERRUPTED_STATUS:  # typer's for Ctrl-C
            print("vllm-omni: stopped", file=sys.stderr)
        return status
    except typer.Abort:
        return FAILURE_STATUS
    except Exception as error:  # the process's main: whatever went wrong leaves as one line
        if show_traceback:
            if isinstance(error, OmniError) and "traceback" in error.details:
                print(error.details["traceback"], file=sys.stderr)  # of the stage's process
            raise
        sys.stderr.write(_message(error))
        return USAGE_STATUS if isinstance(error, BAD_INPUT) else FAILURE_STATUS


def main() -> None:
    """Console entry point."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        # As with ``python -m``: a custom pipeline or an edge function in the working directory can be named.
        sys.path.insert(0, os.getcwd())
    sys.exit(run(sys.argv[1:]))
