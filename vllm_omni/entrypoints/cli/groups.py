"""The dataclasses whose fields are options of the command line, and what of them is no option."""

from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.entrypoints.cli.flags import FlagGroup
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

SAMPLING = FlagGroup(
    OmniDiffusionSamplingParams,
    "Sampling parameters",
    {
        "generator": "a torch object; --seed names the noise",
        "latents": "a tensor",
        "lora_request": "an object of the Python interface",
    },
)
ENGINE = FlagGroup(
    OmniDiffusionConfig,
    "Engine",
    {
        "model": "--model of the command",
        "parallel_config": "its fields are options themselves",
    },
)
PARALLEL = FlagGroup(DiffusionParallelConfig, "Parallelism", {})
