"""vllm-omni: serve models that read and make text, images, audio and video, as a graph of stages.

Names are loaded when they are first used, so that ``import vllm_omni`` costs nothing.
"""

from typing import TYPE_CHECKING

from vllm_omni.lazy import lazy_names
from vllm_omni.version import __version__

if TYPE_CHECKING:
    from vllm_omni.config.model import OmniModelConfig
    from vllm_omni.entrypoints.async_omni import AsyncOmni
    from vllm_omni.entrypoints.omni import Omni
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams
    from vllm_omni.outputs import OmniRequestOutput

_LAZY = {
    "AsyncOmni": "vllm_omni.entrypoints.async_omni",
    "Omni": "vllm_omni.entrypoints.omni",
    "OmniDiffusionSamplingParams": "vllm_omni.inputs.data",
    "OmniModelConfig": "vllm_omni.config.model",
    "OmniRequestOutput": "vllm_omni.outputs",
}

__all__ = [
    "AsyncOmni",
    "Omni",
    "OmniDiffusionSamplingParams",
    "OmniModelConfig",
    "OmniRequestOutput",
    "__version__",
]


__getattr__ = lazy_names(__name__, _LAZY)
