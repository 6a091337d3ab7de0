"""``OmniGPUModelRunner``: vLLM's model runner plus the state of multi-stage requests.

The base is vLLM's V1 runner of the platform; everything here is the same on CPU and CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.models.interfaces import supports_lora
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_omni.config.model import OmniModelConfig
from vllm_omni.core.sched.output import late_chunks
from vllm_omni.distributed.omni_connectors.utils.arena import Arena
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.errors import ConfigError, OmniError
from vllm_omni.model_executor.models.interfaces import OmniRequestState, OmniWarmUp
from vllm_omni.worker.emission import Sender
from vllm_omni.worker.linear_method import use_product_kernels
from vllm_omni.worker.lora import cpu_lora_manager
from vllm_omni.worker.moe_runner import use_expert_kernels
from vllm_omni.worker.payload import OmniPayload, payload_of, unpack

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as VllmModelRunner
else:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as VllmModelRunner


PINNED_BYTES = 1 << 20
"""Tensors up to this size go to a GPU through pinned memory: a copy of other memory waits for what the GPU does. For
larger ones, the prompts, locking memory costs more than that."""


class OmniGPUModelRunner(VllmModelRunner):
    """Keeps one ``OmniRequestState`` a request, from admission to finish."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        """Raises:
        ConfigError: the stage was not configured by ``OmniEngineArgs``.
        """
        super().__init__(vllm_config, device)
        if not isinstance(self.model_config, OmniModelConfig):
            raise ConfigError("an omni worker needs a configuration made by OmniEngineArgs", field="worker_cls")
        self.omni_config: OmniModelConfig = self.model_config
        self.omni_states: dict[str, OmniRequestState] = {}
        self.omni_emit: set[str] = set()
        """Requests whose hidden states are sent on."""
        self._omni_rank = 0
        # Two arenas: payloads are read on the main thread and, under asynchronous scheduling, written on another.
        self._omni_in = Codec(Arena())
        self._omni_out = Codec(Arena(), self.omni_config.payload_threshold)

    @property
    def omni_sends(self) -> bool:
        """Whether this rank's outputs are read: one of the tensor-parallel ranks."""
        return self._omni_rank == 0

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then look up which hooks it has."""
        super().load_model(*args, **kwargs)
        self._omni_rank = get_tp_group().rank_in_group
        self._find_hooks(self.get_model())
        with torch.inference_mode():
            use_expert_kernels(self.get_model(), self.device)
            use_product_kernels(self.get_model(), self.device, self.vllm_config)

    def load_lora_model(self, model: Any, vllm_config: VllmConfig, device: torch.device) -> Any:
        """vLLM's own; on CPU with a manager under which a step may hold requests without an adapter as well."""
        if self.device.type != "cpu" or not supports_lora(model):
            return super().load_lora_model(model, vllm_config, device)
        self.lora_manager = cpu_lora_manager(vllm_config, device, model)
        return self.lora_manager.create_lora_manager(model, vllm_config)

    def _find_hooks(self, model: torch.nn.Module) -> None:
        """Note which protocols of ``model_executor.models.interfaces`` the model implements."""

    def omni_warm_up(self) -> None:
        """Let the model prepare for requests, after the KV cache stands."""
        model = self.get_model()
        if isinstance(model, OmniWarmUp):
            with torch.inference_mode():
                model.omni_warm_up(self.max_num_reqs)

    def omni_counts(self) -> dict[str, int]:
        """Open requests and segments of shared memory that are still read."""
        arena = self._omni_out.arena
        assert arena is not None
        arena.reap()
        return {"requests": len(self.omni_states), "busy_segments": arena.stats()["busy"]}

    def _update_omni(self, scheduler_output: SchedulerOutput) -> None:
        """Open, feed and close request states as the scheduler says. A preempted request keeps its state."""
        for req_id in scheduler_output.finished_req_ids:
            self.omni_states.pop(req_id, None)
            self.omni_emit.discard(req_id)
        for new in scheduler_output.scheduled_new_reqs:
            payload = payload_of(new)
            state = OmniRequestState(new.req_id, new.prompt_len, last=payload.last, sampling_params=new.sampling_params)
            self.omni_states[new.req_id] = state
            if payload.emit:
                self.omni_emit.add(new.req_id)
            self._read(state, payload, into=state.info)
        for req_id, payload in late_chunks(scheduler_output):
            state = self.omni_states[req_id]
            chunk: dict[str, Any] = {}
            self._read(state, payload, into=chunk)
            if chunk:
                state.chunks.append(chunk)
            state.last = payload.last

    def _read(self, state: OmniRequestState, payload: OmniPayload, into: dict[str, Any]) -> None:
        """Unpack a payload onto the device; what cannot be read fails this request alone."""
        if not payload.data or state.error is not None:
            return
        try:
            into.update(_to_device(unpack(payload.data[self._omni_rank], self._omni_in), self.device))
        except OmniError as error:
            state.error = error

    def _sender(self) -> Sender:
        return Sender(self._omni_out, self.omni_config.driver_pid)


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        if device.type == "cuda" and 0 < value.nbytes <= PINNED_BYTES:
            value = value.pin_memory()
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_device(item, device) for item in value]
    return value
