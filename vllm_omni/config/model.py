"""``OmniModelConfig``: vLLM's model configuration with what one stage of a graph needs beside it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from vllm.config import ModelConfig


def _default_connector() -> dict[str, Any]:
    return {"name": "SharedMemoryConnector", "extra": {}}


@dataclass
class OmniModelConfig(ModelConfig):
    """Model configuration of an autoregressive or generation stage.

    Built from a checked ``ModelConfig`` by ``of``; vLLM's own checks are not run a second time.
    """

    stage_id: int = 0
    """Number of the stage in the graph."""
    async_chunk: bool = False
    """Whether the stage takes its conditioning in chunks while it runs."""
    model_stage: str = "thinker"
    """Role of the stage: ``thinker``, ``talker``, ``code2wav``, ..."""
    model_arch: str = "Qwen2_5OmniForConditionalGeneration"
    """Architecture that the stage loads, a name of the model registry."""
    engine_output_type: str | None = None
    """Kind of the stage's output for the caller: ``text``, ``audio``, ``latent``."""
    hf_config_name: str | None = None
    """Part of the checkpoint's configuration that the stage's model is built from, such as ``talker_config``."""
    stage_connector_config: dict[str, Any] = field(default_factory=_default_connector)
    """Connector that carries big payloads away from the stage: ``name`` and ``extra``."""
    omni_kv_config: dict[str, Any] | None = None
    """Transfer of the KV cache to another stage."""
    hidden_layers: tuple[int, ...] = ()
    """Hidden states that the stage sends on, numbered as in transformers' ``hidden_states``: 0 is the embeddings, ``k``
    what ``k`` layers made, and -1 the final, normed state."""
    hidden_rows: str = "all"
    """Positions whose hidden states are sent: ``all``, or ``media``: the prompt's, of prompts with media."""

    takes_payload: bool = False
    """Whether the stage's model reads what comes with a request."""
    driver_pid: int = 1
    """Process that reads what the stage sends; 1 when it is not known."""
    runtime_path: str | None = None
    """Folder of everything with a name that the engine makes; None when it has none of its own."""

    @property
    def payload_threshold(self) -> int:
        """Bytes above which a tensor that leaves the stage goes through the connector instead of the message."""
        threshold: int = self.stage_connector_config["extra"].get("shm_threshold_bytes", 65536)
        return threshold

    @classmethod
    def of(cls, base: ModelConfig, **values: Any) -> OmniModelConfig:
        """``base`` with the stage's ``values``."""
        config = cls.__new__(cls)
        config.__dict__.update(base.__dict__)
        config.stage_connector_config = _default_connector()
        for name, value in values.items():
            if name not in cls.__dataclass_fields__:
                raise TypeError(f"OmniModelConfig has no field {name!r}")
            setattr(config, name, value)
        return config

    def compute_hash(self) -> str:
        """Key of the compiled graph: the layers whose states leave the graph belong to it."""
        base = super().compute_hash()
        return hashlib.sha256(f"{base}:{self.hidden_layers}".encode()).hexdigest() if self.hidden_layers else base
