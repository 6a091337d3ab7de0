"""Regional compilation: the blocks that a transformer repeats are compiled once and reused."""

from __future__ import annotations

from typing import Any

from torch import nn

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import ConfigError
from vllm_omni.logger import init_logger
from vllm_omni.platforms import get_platform

logger = init_logger(__name__)


def compile_repeated_blocks(pipeline: nn.Module, od_config: OmniDiffusionConfig, *, backend: str | None = None) -> int:
    """Compile every module of ``pipeline`` whose class is listed in a transformer's ``_repeated_blocks``.

    The blocks of one class share one compiled graph, so the cold start is that of a single block. Nothing is compiled
    with ``enforce_eager``, nor on a platform that does not compile by default, unless ``backend`` asks for it.

    Args:
        pipeline: the loaded pipeline.
        od_config: configuration of the stage.
        backend: torch.compile backend; None takes the platform's choice.

    Returns:
        Number of compiled modules.

    Raises:
        ConfigError: a class of ``_repeated_blocks`` does not occur in its transformer.
    """
    if od_config.enforce_eager or (backend is None and not get_platform(od_config.device_type).compiles):
        return 0
    compiled = 0
    for owner in list(pipeline.modules()):
        for class_name in _repeated_blocks(owner):
            blocks = [module for module in owner.modules() if type(module).__name__ == class_name]
            if not blocks:
                raise ConfigError(f"{type(owner).__name__}._repeated_blocks: no module of class {class_name!r} in it")
            for block in blocks:
                block.compile(backend=backend or "inductor")
            compiled += len(blocks)
    logger.info("compiling %d repeated blocks on first use", compiled)
    return compiled


def _repeated_blocks(module: nn.Module) -> list[str]:
    """``_repeated_blocks`` of the module's class; diffusers' own components (the VAE) are not ours to compile."""
    cls: Any = type(module)
    if cls.__module__.startswith(("diffusers.", "transformers.")):
        return []
    return next(
        (list(base.__dict__["_repeated_blocks"]) for base in cls.__mro__ if "_repeated_blocks" in base.__dict__), []
    )
