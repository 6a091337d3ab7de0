"""The dataclasses whose fields are options of the command line, and what of them is no option."""

from collections.abc import Mapping
from typing import Any

from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.entrypoints.cli.flags import FlagGroup, option_name
from vllm_omni.entrypoints.omni_args import OmniArgs
from vllm_omni.entrypoints.openai.args import ServeArgs
from vllm_omni.entrypoints.openai.text_args import TextArgs
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

OMNI = FlagGroup(
    OmniArgs,
    "Model and stages",
    {"ray_address": "for a backend that is not there yet"},
)
SAMPLING = FlagGroup(
    OmniDiffusionSamplingParams,
    "Sampling parameters",
    {
        "generator": "a torch object; --seed names the noise",
        "latents": "a tensor",
        "num_previews": "the command line shows the steps alone",
        "lora_request": "an object of the Python interface",
    },
)
ENGINE = FlagGroup(
    OmniDiffusionConfig,
    "Engine of diffusion stages",
    {
        "model": "an option of the group before",
        "parallel_config": "its fields are options themselves",
    },
)
PARALLEL = FlagGroup(DiffusionParallelConfig, "Parallelism of diffusion stages", {})
SERVE = FlagGroup(ServeArgs, "HTTP server", {})
TEXT = FlagGroup(TextArgs, "Text, as vLLM's server makes it", {})

OMNI_GROUPS = (OMNI, ENGINE, PARALLEL)
"""Everything that ``Omni`` and ``AsyncOmni`` are built with."""


def omni_arguments(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``Omni`` that the user typed."""
    return {name: value for group in OMNI_GROUPS for name, value in group.given(flags).items()}


def flag_sources(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Where typed arguments come from, for messages and ``config show``."""
    return {name: option_name(name) for name in arguments}
