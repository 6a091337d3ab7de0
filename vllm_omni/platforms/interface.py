"""What differs between kinds of devices, as data: names only, no kernels and no forks of the runner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_omni.config.schema import nearest
from vllm_omni.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Platform:
    """One kind of device."""

    device_type: str
    """Name that torch knows it by."""
    dist_backend: str
    """torch.distributed backend of its collectives."""
    attention_backends: tuple[str, ...]
    """Attention backends by preference; one that cannot be loaded is passed over when the choice is ``auto``."""
    compiles: bool
    """Whether repeated blocks are compiled by default."""

    def device(self, local_rank: int = 0) -> torch.device:
        """The device of the rank ``local_rank`` of this host."""
        import torch

        return torch.device("cpu") if self.device_type == "cpu" else torch.device(self.device_type, local_rank)


_PLATFORMS = {
    "cpu": Platform("cpu", "gloo", ("SDPA",), compiles=False),
    "cuda": Platform("cuda", "nccl", ("FLASH_ATTN", "SDPA"), compiles=True),
}


def get_platform(device_type: str) -> Platform:
    """The platform ``device_type`` (``OmniDiffusionConfig.device_type``).

    Raises:
        ConfigError: a kind of device that is not known.
    """
    if device_type not in _PLATFORMS:
        raise ConfigError(f"device={device_type!r}{nearest(device_type, _PLATFORMS)}", field="device")
    return _PLATFORMS[device_type]
