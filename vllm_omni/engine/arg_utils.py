"""``OmniEngineArgs``: vLLM's engine arguments plus those of a stage; builds the stage's ``VllmConfig``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from vllm.config import ProfilerConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.platforms import current_platform

from vllm_omni import envs
from vllm_omni.config.model import OmniModelConfig
from vllm_omni.config.schema import nearest
from vllm_omni.engine.vllm_env import prepare_environment
from vllm_omni.engine.vllm_errors import as_config_errors, reason
from vllm_omni.errors import ConfigError
from vllm_omni.model_executor.models.interfaces import (
    OmniEmbedder,
    OmniGenerator,
    OmniPositioner,
    OmniSampler,
    OmniStepper,
)
from vllm_omni.model_executor.models.registry import config_override, ensure_registered, model_class

_WORKER = "vllm_omni.worker.gpu_ar_worker"
_SCHEDULER = "vllm_omni.core.sched"
_GENERATION_FIXED: dict[str, Any] = {
    "enforce_eager": True,
    "async_scheduling": False,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
}
_GENERATION_KV_BYTES = 16 << 20
"""A generation stage has no KV cache. A size that is given keeps vLLM from measuring what other stages of the same GPU
hold, so that they may start at the same time."""


@dataclass
class OmniEngineArgs(EngineArgs):
    """Engine arguments of an autoregressive or generation stage: vLLM's own, and these."""

    stage_id: int = 0
    """Number of the stage in the graph."""
    stage_type: Literal["ar", "generation"] = "ar"
    """``ar`` makes tokens one by one, ``generation`` makes its output in one pass."""
    model_stage: str = "thinker"
    """Role of the stage."""
    model_arch: str | None = None
    """Architecture to load; None takes the checkpoint's own."""
    engine_output_type: str | None = None
    """Kind of the stage's output for the caller."""
    hf_config_name: str | None = None
    """Part of the checkpoint's configuration to build the model from."""
    stage_connector_config: dict[str, Any] | None = None
    """Connector that carries big payloads: ``name`` and ``extra``."""
    omni_kv_config: dict[str, Any] | None = None
    """Transfer of the KV cache to another stage."""
    async_chunk: bool = False
    """Whether conditioning arrives in chunks while the stage runs."""
    hidden_layers: tuple[int, ...] = field(default=())
    """Hidden states to send on: 0 is the embeddings, ``k`` what ``k`` layers made, -1 the final, normed state."""
    hidden_rows: Literal["all", "media"] = "all"
    """Positions whose hidden states are sent: all, or the prompt's, of prompts with media."""

    @classmethod
    def from_stage(
        cls, stage_id: int, stage_type: Literal["ar", "generation"], engine_args: Mapping[str, Any]
    ) -> OmniEngineArgs:
        """Build from the ``engine_args`` of a stage configuration.

        Raises:
            ConfigError: an unknown key, with the nearest known one, or a value that contradicts the stage's type.
        """
        values = dict(engine_args)
        known = {f.name for f in fields(cls)}
        worker_type = values.pop("worker_type", stage_type)
        if worker_type != stage_type:
            raise ConfigError(
                f"stage {stage_id}: worker_type={worker_type!r} but stage_type={stage_type!r}", field="worker_type"
            )
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"stage {stage_id}: unknown engine argument {key!r}{nearest(key, known)}",
                    field=f"engine_args.{key}",
                )
        values["hidden_layers"] = tuple(values.get("hidden_layers") or ())
        return cls(**{**values, "stage_id": stage_id, "stage_type": stage_type})

    def __post_init__(self) -> None:
        """Raises:
        ConfigError: a value that a generation stage, or any omni stage, cannot honour.
        """
        prepare_environment()
        super().__post_init__()
        if isinstance(self.profiler_config, dict):  # type: ignore[has-type]  # as a stage configuration has it
            self.profiler_config = ProfilerConfig(**self.profiler_config)  # type: ignore[has-type]
        if self.profiler_config.profiler is None:
            folder = os.path.join(os.path.abspath(envs.VLLM_TORCH_PROFILER_DIR()), f"stage_{self.stage_id}")
            self.profiler_config = ProfilerConfig(profiler="torch", torch_profiler_dir=folder)
        if self.stage_type == "generation":
            defaults = {f.name: f.default for f in fields(self)}
            for name, value in _GENERATION_FIXED.items():
                given = getattr(self, name)
                if given not in (defaults[name], value):
                    self._refuse(name, f"a generation stage has {name}={value}")
                setattr(self, name, value)
            if self.kv_cache_memory_bytes is None:  # type: ignore[has-type]
                self.kv_cache_memory_bytes = _GENERATION_KV_BYTES
            if self.hidden_layers:
                self._refuse("hidden_layers", "a generation stage has no hidden states to send")
        if self.omni_kv_config is not None:
            self._refuse("omni_kv_config", "a KV cache cannot be handed to another stage yet")
        if self.watermark_config is not None:
            self._refuse(
                "watermark_config", "vLLM has it in its V2 model runner alone; omni stages run on its V1 runner"
            )
        if self.worker_cls != "auto":  # type: ignore[has-type]
            self._refuse("worker_cls", "omni stages bring their own worker; use worker_extension_cls to add methods")
        if self.scheduler_cls is not None:
            self._refuse("scheduler_cls", "omni stages bring their own scheduler")
        if self.pipeline_parallel_size > 1:
            self._refuse(
                "pipeline_parallel_size", "omni stages do not split layers over ranks; use tensor_parallel_size"
            )
        if self.hidden_rows not in ("all", "media"):
            self._refuse("hidden_rows", "allowed are all and media")
        if self.hidden_rows == "media" and not self.hidden_layers:
            self._refuse("hidden_rows", "without hidden_layers there is nothing to send")
        if self.speculative_config is not None and self.hidden_layers:
            self._refuse("speculative_config", "a drafter and hidden_layers share vLLM's way out for inner layers")
        self.worker_cls = f"{_WORKER}.{'GPUARWorker' if self.stage_type == 'ar' else 'GPUGenerationWorker'}"

    def _refuse(self, name: str, why: str) -> None:
        raise ConfigError(f"stage {self.stage_id}: {name}={getattr(self, name)!r}: {why}", field=f"engine_args.{name}")

    def create_model_config(self) -> OmniModelConfig:
        """vLLM's model configuration of the stage's part of the checkpoint, with the stage's own fields."""
        if self.model_arch is not None:
            ensure_registered([self.model_arch])
        override = config_override(self.model_arch, self.hf_config_name, self.hf_overrides)  # type: ignore[has-type]
        if override is not None:
            self.hf_overrides = override
            if self.hf_config_name is not None and self.model_stage != "thinker" and self.generation_config == "auto":  # type: ignore[has-type]
                self.generation_config = "vllm"  # the checkpoint's defaults are the text model's
        base = self._base_config()
        model = model_class(base.architectures, base)
        embeds = issubclass(model, OmniEmbedder)
        self._check_model(model, base)
        if embeds:
            base.enable_prompt_embeds = self.enable_prompt_embeds = True
            if self.enable_prefix_caching is None:  # type: ignore[has-type]
                self.enable_prefix_caching = False  # prompts are placeholders: nothing to share
        values: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("stage_id", "async_chunk", "model_stage", "engine_output_type", "hf_config_name")
        }
        if self.stage_connector_config is not None:
            values["stage_connector_config"] = self.stage_connector_config
        return OmniModelConfig.of(
            base,
            model_arch=self.model_arch or base.architectures[0],
            omni_kv_config=self.omni_kv_config,
            hidden_layers=self.hidden_layers,
            hidden_rows=self.hidden_rows,
            takes_payload=issubclass(model, (OmniEmbedder, OmniPositioner, OmniStepper, OmniSampler)),
            driver_pid=os.getpid(),
            **values,
        )

    def _base_config(self) -> Any:
        """vLLM's own model configuration.

        Raises:
            ConfigError: the checkpoint has fewer positions than ``max_model_len``, or none.
        """
        given = self.max_model_len
        try:
            return super().create_model_config()
        except ValueError as error:
            if not isinstance(given, int) or given <= 0:
                raise
            longest = self._longest_context(error)
            if given <= longest:
                raise
            raise ConfigError(
                f"stage {self.stage_id}: max_model_len={given}: allowed are 1 to {longest}, the checkpoint's positions",
                field="engine_args.max_model_len",
                stage_id=self.stage_id,
                value=given,
                allowed=f"1 to {longest}",
            ) from None

    def _longest_context(self, refused: ValueError) -> int:
        """What vLLM takes for ``max_model_len`` when it is not given, which it ``refused``."""
        given, self.max_model_len = self.max_model_len, None  # type: ignore[has-type]
        try:
            longest: int = super().create_model_config().max_model_len
        except ValueError as error:
            if reason(error) == reason(refused):
                raise
            raise ConfigError(
                f"stage {self.stage_id}: model={self.model!r}: the checkpoint's own context: {reason(error)}",
                field="engine_args.model",
                stage_id=self.stage_id,
            ) from error
        finally:
            self.max_model_len = given
        return longest

    def _check_model(self, model: type[Any], base: Any) -> None:
        if issubclass(model, OmniGenerator) != (self.stage_type == "generation"):
            hooks = "has" if self.stage_type == "ar" else "has no"
            self._refuse("stage_type", f"{model.__name__} {hooks} omni_generate")
        if self.speculative_config is not None and issubclass(model, (OmniStepper, OmniSampler)):
            self._refuse("speculative_config", f"{model.__name__} works on each token")
        count = base.get_total_num_hidden_layers() if self.hidden_layers else 0
        for layer in self.hidden_layers:
            if not -1 <= layer < count:
                self._refuse("hidden_layers", f"allowed are 0 to {count - 1}, and -1 for the final state")
            if layer > 0 and not supports_eagle3(model):
                self._refuse("hidden_layers", f"{model.__name__} shows no inner layers; allowed are 0 and -1")

    def create_engine_config(self, *args: Any, **kwargs: Any) -> VllmConfig:
        """The stage's ``VllmConfig``.

        Raises:
            ConfigError: vLLM refuses a setting.
        """
        with as_config_errors(f"stage {self.stage_id}", "engine_args", stage_id=self.stage_id):
            config = super().create_engine_config(*args, **kwargs)
        if config.use_v2_model_runner:  # which vLLM takes for some settings, whatever the environment says
            raise ConfigError(f"stage {self.stage_id}: omni stages run on vLLM's V1 model runner", field="engine_args")
        if config.lora_config is not None and config.model_config.is_moe and current_platform.is_cpu():
            self._refuse("enable_lora", "vLLM's experts beside adapters need a GPU")
        if self.stage_type == "generation":
            name = "omni_generation_scheduler.OmniGenerationScheduler"
        elif config.scheduler_config.async_scheduling:
            name = "omni_ar_scheduler.OmniARAsyncScheduler"
        else:
            name = "omni_ar_scheduler.OmniARScheduler"
        config.scheduler_config.scheduler_cls = f"{_SCHEDULER}.{name}"
        return config
