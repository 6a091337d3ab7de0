"""``vllm-omni serve``: the HTTP server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vllm_omni.config.schema import parse
from vllm_omni.entrypoints.cli.flags import with_flags
from vllm_omni.entrypoints.cli.groups import OMNI_GROUPS, SERVE, TEXT, omni_arguments
from vllm_omni.entrypoints.cli.vllm_flags import VllmFlagsCommand, vllm_arguments
from vllm_omni.entrypoints.openai.args import ServeArgs
from vllm_omni.entrypoints.openai.text_args import TextArgs
from vllm_omni.errors import ConfigError


def serve(
    context: typer.Context,
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder of the checkpoint, or a hub name; as --model.")
    ] = None,
    omni: Annotated[
        bool, typer.Option("--omni", help="Accepted because other servers need it; this one is always omni.")
    ] = False,
    **flags: Any,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients expect it.

    Engine options of vLLM (--max-model-len, ...) are taken, too, for the stages that run on vLLM; --stage-overrides
    sets them for one stage. The server answers when every stage is ready. SIGTERM and Ctrl-C let open requests finish,
    for --drain-timeout seconds at most; a second one does not wait.
    """
    args = parse(ServeArgs, SERVE.given(flags), "serve")
    text = parse(TextArgs, TEXT.given(flags), "serve")
    arguments = {**vllm_arguments(context), **omni_arguments(flags)}
    if checkpoint is not None:
        if "model" in arguments:
            raise ConfigError("the model is given twice, as argument and as --model", field="model")
        arguments["model"] = checkpoint
    from vllm_omni.entrypoints.openai.server import run_server

    run_server(args, text, arguments)


COMMAND = with_flags(serve, SERVE, TEXT, *OMNI_GROUPS)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve", cls=VllmFlagsCommand)(COMMAND)
