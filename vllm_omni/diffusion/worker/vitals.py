"""Makes the parts of a pipeline say that they get on, so that a long step can be told from one that hangs."""

from __future__ import annotations

from typing import Any

from torch import nn

from vllm_omni import pulse
from vllm_omni.diffusion.models.common.transformer import DiTModel


def report_progress(pipeline: Any, *, compiled: bool) -> int:
    """Have each layer say so when it is called: every module that stands in a list of modules.

    These are the blocks of transformers and text encoders and the stages of VAEs, whoever wrote them. Blocks that are
    compiled are left out: on a GPU a whole step takes less time than a hang takes to be believed.

    Args:
        pipeline: the loaded pipeline; one that is no module has no layers.
        compiled: whether the transformers' blocks are.

    Returns:
        The number of layers.
    """
    if not isinstance(pipeline, nn.Module):
        return 0
    skipped: set[nn.Module] = set()
    if compiled:
        for owner in pipeline.modules():
            if isinstance(owner, DiTModel):
                skipped.update(owner.modules())
    layers = {
        layer
        for holder in pipeline.modules()
        if isinstance(holder, nn.ModuleList)
        for layer in holder
        if layer not in skipped
    }
    for layer in layers:
        layer.register_forward_pre_hook(_advance)
    return len(layers)


def _advance(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    pulse.advance()
