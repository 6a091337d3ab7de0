"""``GPUARWorker`` and ``GPUGenerationWorker``: vLLM's worker of the platform with this package's model runners."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from vllm_omni.config.model import OmniModelConfig
from vllm_omni.distributed.runtime_directory import remove_folder, rendezvous, unlink_shared_memory
from vllm_omni.errors import ConfigError
from vllm_omni.model_executor.models.registry import ensure_registered
from vllm_omni.process import die_with_process, end_in_order
from vllm_omni.worker.gpu_ar_model_runner import GPUARModelRunner
from vllm_omni.worker.gpu_generation_model_runner import GPUGenerationModelRunner
from vllm_omni.worker.lora import fits_nothing
from vllm_omni.worker.model_runner import OmniGPUModelRunner

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as VllmWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as VllmWorker


class OmniWorker(VllmWorker):
    """Builds the runner of ``runner_cls`` and makes the package's models known in the worker's process."""

    runner_cls: type[OmniGPUModelRunner]
    model_runner: OmniGPUModelRunner

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        ensure_registered(vllm_config.model_config.architectures)
        super().__init__(vllm_config, *args, **kwargs)
        if self.use_v2_model_runner:
            raise ConfigError("omni stages run on vLLM's V1 model runner", field="VLLM_USE_V2_MODEL_RUNNER")
        config = vllm_config.model_config
        if not isinstance(config, OmniModelConfig):
            raise ConfigError("an omni worker needs a configuration made by OmniEngineArgs", field="worker_cls")
        self._folder = config.runtime_path
        self._fitting: set[tuple[int, str]] = set()
        clean = None if self._folder is None else partial(remove_folder, self._folder)
        die_with_process(config.driver_pid, clean)
        if self._folder is not None and self.distributed_init_method.startswith("file://"):  # type: ignore[has-type]
            self.distributed_init_method = rendezvous(self._folder)

    def init_device(self) -> None:
        """vLLM's start of the device. Its CPU worker builds its runner inline, so it is built again here."""
        super().init_device()
        if self._folder is not None and current_platform.is_cpu():
            # Once every rank has mapped the memory over which they talk it needs no name, and goes with them.
            torch.distributed.barrier()
            unlink_shared_memory(self._folder)
        if not isinstance(self.model_runner, self.runner_cls):
            self.model_runner = self._make_model_runner()

    def _make_model_runner(self) -> OmniGPUModelRunner:
        return self.runner_cls(self.vllm_config, self.device)

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load an adapter.

        Raises:
            ValueError: its weights are for none of the model's modules: it would do nothing.
        """
        added: bool = super().add_lora(lora_request)
        key = (lora_request.lora_int_id, lora_request.lora_path)
        if key not in self._fitting:
            if fits_nothing(self.model_runner.lora_manager, lora_request.lora_int_id):
                self.remove_lora(lora_request.lora_int_id)
                raise ValueError(f"the weights in {lora_request.lora_path} are for no module of the model")
            self._fitting.add(key)
        return added

    def omni_counts(self) -> dict[str, int]:
        """Open requests and shared-memory segments that are still read, for health reports and tests."""
        return self.model_runner.omni_counts()

    def shutdown(self) -> None:
        """vLLM's release of what the worker holds; at the end of its process the kernel does that, and quicker."""
        config = self.vllm_config
        if config.kv_transfer_config is None and config.ec_transfer_config is None:  # these have peers
            if self.profiler is not None:
                self.profiler.shutdown()
            end_in_order()
        super().shutdown()

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's warm-up, then the model's own."""
        times = super().compile_or_warm_up_model()
        self.model_runner.omni_warm_up()
        return times


class GPUARWorker(OmniWorker):
    """Worker of an autoregressive stage."""

    runner_cls = GPUARModelRunner


class GPUGenerationWorker(OmniWorker):
    """Worker of a generation stage."""

    runner_cls = GPUGenerationModelRunner
