"""Kernels that start before the one in front of them has ended.

On GPUs that can (compute capability 9 and up) a kernel starts while the one before it still runs: it reads weights,
waits for the end of the kernel before it, and only then reads what that one wrote (programmatic dependent launch, CUDA
programming guide). Two rules make that safe. Every kernel of a chain waits before it reads or writes anything but
weights; and a weight is not written by the few kernels before the one that reads it. So after its wait a kernel may use
whatever any earlier kernel wrote. Imported only where there is a GPU.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vllm_omni.logger import init_logger
from vllm_omni.model_executor.layers.graphed import record

logger = init_logger(__name__)

OFF, EARLY = 0, 1
"""When the next kernel may start: after this one, or at once."""
_overlap: dict[torch.device, int] = {}
_early_fails: dict[torch.device, bool] = {}
REPEATS = 20
"""Runs of a graph in ``repeats``."""


def overlap(device: torch.device) -> int:
    """When kernels on ``device`` let the next one start."""
    return _overlap.get(device, OFF)


def set_overlap(device: torch.device, when: int) -> None:
    """Choose when kernels on ``device`` let the next one start; only ``OFF`` where it ``can_overlap`` not."""
    _overlap[torch.empty(0, device=device).device] = when  # with its number


def checked_overlap(device: torch.device, check: Callable[[], str | None]) -> str | None:
    """What ``check`` finds wrong with kernels on ``device`` that wait for each other's end, or None.

    Where the GPU can, kernels start early from now on, unless they are then wrong, now or in an earlier check.
    """
    device = torch.empty(0, device=device).device  # with its number
    refused = _early_fails.get(device, False)
    set_overlap(device, OFF)
    wrong = check()
    if wrong is None and not refused and can_overlap(device):
        set_overlap(device, EARLY)
        early = check()
        if early is not None:
            _early_fails[device] = True
            set_overlap(device, OFF)
            logger.warning("kernels wait for each other's end on %s: started early, %s", device, early)
    return wrong


def repeats(function: Callable[[], tuple[torch.Tensor, ...]], x: torch.Tensor, inputs: torch.Tensor) -> bool:
    """Whether a graph of ``function``, which reads ``x``, gives the same each time it is run on the same of ``inputs``.

    The inputs take turns, so that a kernel that comes too early finds what another input left.
    """
    graph, results = record(function, None)
    first: list[tuple[torch.Tensor, ...]] = []
    for turn in range(REPEATS):
        x.copy_(inputs[turn % len(inputs)])
        graph.replay()
        found = tuple(result.clone() for result in results)
        if turn < len(inputs):
            first.append(found)
        elif not all(map(torch.equal, found, first[turn % len(inputs)])):
            return False
    return True


def can_overlap(device: torch.device) -> bool:
    """Whether the GPU has programmatic dependent launch."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def announce(launch_pdl: tl.constexpr):
    """First in a kernel: the next one may start."""
    if launch_pdl != 0:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def follow(launch_pdl: tl.constexpr):
    """Wait for the end of the kernel before."""
    if launch_pdl != 0:
        tl.extra.cuda.gdc_wait()
