"""vLLM's engine options on our command line, and what to use instead of options that are not there.

vLLM's own parser reads them, so they have vLLM's names, types and forms. They go to every stage that runs on vLLM.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from vllm_omni.config.schema import nearest
from vllm_omni.diffusion.data import INSTEAD
from vllm_omni.errors import ConfigError

KEY = "vllm_omni.vllm_flags"
"""Where a command finds the values: ``typer.Context.meta``."""

_FLAGS_INSTEAD = {
    "usp": "use --ulysses-degree",
    "ring": "use --ring-degree",
    "num_gpus": "use --tensor-parallel-size or another parallel size; the number of GPUs follows from them",
    "log_file": "redirect the standard error instead",
    "ray_address": "stages run as processes of this machine",
    "deploy_config": "use --stage-configs-path",
    "strategy_config": "use --stage-configs-path or --stage-overrides",
    "async_chunk": "it is a key of the stage configuration (--stage-configs-path)",
    "no_async_chunk": "it is a key of the stage configuration (--stage-configs-path)",
    "diffusion_attention_backend": "use --attention-backend",
    "enable_diffusion_pipeline_profiler": "use /start_profile and /stop_profile",
    "enable_orch_monitor": "use /metrics",
    "disable_log_stats": "nothing is logged unless --log-stats says so",
    "disable_uvicorn_access_log": "nothing is logged unless --access-log says so",
    "allowed_methods": "--allowed-origins allows all methods",
    "allowed_headers": "--allowed-origins allows all headers",
    **dict.fromkeys(
        ("diffusion_quantization_config", "diffusion_kv_cache_dtype"), "there is no quantisation yet, use --dtype"
    ),
    **dict.fromkeys(
        ("cache_backend", "cache_config", "enable_cache_dit_summary"), "there are no caches that skip steps yet"
    ),
    **dict.fromkeys(("use_hsdp", "hsdp_shard_size", "hsdp_replicate_size"), "use --tensor-parallel-size"),
    **dict.fromkeys(("vae_patch_parallel_size", "vae_parallel_mode"), "use --vae-use-tiling"),
}
"""Options of upstream's and of vLLM's servers that are not there -> what to do."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _vllm_parser() -> argparse.ArgumentParser:
    """vLLM's parser of engine options, which gives what was typed and no defaults."""
    from vllm.engine.arg_utils import EngineArgs

    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    EngineArgs.add_cli_args(parser)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser


def _refused(option: str, known: Collection[str]) -> ConfigError:
    name = option.lstrip("-").replace("-", "_")
    instead = _FLAGS_INSTEAD.get(name)
    if instead is None and name in INSTEAD:
        instead = INSTEAD[name].removeprefix("; ")
    hint = f"; {instead}" if instead is not None else _near(option, known)
    return ConfigError(f"No such option: {option}{hint}", field=name)


def _near(option: str, known: Collection[str]) -> str:
    hint = nearest(option, known)
    return hint if "did you mean" in hint else " (--help lists ours; vLLM's engine options are known, too)"


def divide(words: Sequence[str], ours: Collection[str]) -> tuple[list[str], dict[str, Any]]:
    """A command line without vLLM's options, and their values.

    Args:
        words: the arguments.
        ours: options of the command itself.

    Raises:
        ConfigError: an option that is neither's, or a wrong value.
    """
    if not any(_is_option(word) and word.split("=")[0] not in ours for word in words):
        return list(words), {}
    for word in words:
        if _is_option(word) and word.lstrip("-").split("=")[0].replace("-", "_") in _FLAGS_INSTEAD:
            raise _refused(word.split("=")[0], ours)
    parser = _vllm_parser()
    theirs = {option: action for action in parser._actions for option in action.option_strings}
    own: list[str] = []
    taken: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        option = word.split("=")[0].split(".")[0]
        if not _is_option(word) or word.split("=")[0] in ours:
            own.append(word)
            continue
        action = theirs.get(option.replace("_", "-"))
        if action is None:
            raise _refused(word.split("=")[0], [*ours, *theirs])
        taken.append(word)
        if "=" not in word and action.nargs != 0:
            many = action.nargs in ("+", "*")
            while words and not _is_option(words[0]):
                taken.append(words.pop(0))
                if not many:
                    break
    return own, vars(parser.parse_args(taken))


def _is_option(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


class VllmFlagsCommand(TyperCommand):
    """A command that takes vLLM's engine options beside its own; ``context.meta[KEY]`` has their values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ours = {option for parameter in self.params for option in (*parameter.opts, *parameter.secondary_opts)}
        own, ctx.meta[KEY] = divide(args, ours | {"--help"})
        rest: list[str] = super().parse_args(ctx, own)
        return rest


def vllm_arguments(context: typer.Context) -> dict[str, Any]:
    """vLLM's engine options that the user typed."""
    values: dict[str, Any] = context.meta[KEY]
    return values
