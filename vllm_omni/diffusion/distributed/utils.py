"""Small questions that a model asks about its rank."""

from __future__ import annotations

import torch

from vllm_omni.diffusion.distributed import parallel_state


def get_local_device() -> torch.device:
    """The device that this rank's model lives on.

    Raises:
        ConfigError: the process has not joined its groups yet.
    """
    return parallel_state.get_device()
