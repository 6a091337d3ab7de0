"""Start vLLM's engine processes of several stages, wait until they are ready, and end them. Blocking code.

All processes are started before the first is waited for, except those that share a GPU and size their KV cache by
measuring free memory: these start one after another.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.utils import EngineZmqAddresses, get_engine_zmq_bind_addresses, launch_core_engines
from vllm.v1.executor import Executor

from vllm_omni.distributed.runtime_directory import RuntimeDirectory
from vllm_omni.engine.arg_utils import OmniEngineArgs
from vllm_omni.engine.stage_engine import StageInfo
from vllm_omni.errors import ConfigError, DeadlineError, StageDeadError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

GRACE = 5.0
"""Seconds that an engine has to end before it is killed."""


@dataclass(frozen=True)
class ARStageSpec:
    """What a stage's engine is started with."""

    stage_id: int
    stage_type: Literal["ar", "generation"]
    engine_args: Mapping[str, Any]
    """As in the stage configuration, with ``devices`` from its ``runtime``."""
    threshold: int = 65536
    """Tensors of its outputs above this many bytes go to shared memory."""
    final_output_type: str | None = "text"
    """Kind of output that the caller gets of it; None: nothing."""
    async_chunk: bool = False
    """Whether outputs go from stage to stage while their source still works."""
    env: Mapping[str, str] = field(default_factory=dict)
    """What its processes get in their environment beside the driver's."""

    def config(self) -> VllmConfig:
        """The checked configuration.

        Raises:
            ConfigError: an argument is unknown, wrong, or cannot be honoured.
        """
        values = dict(self.engine_args)
        for name, instead in _SET_ELSEWHERE.items():
            if name in values:
                raise ConfigError(
                    f"stage {self.stage_id}: engine_args.{name} is not set here; {instead}", field=f"engine_args.{name}"
                )
        kind = self.final_output_type or "latent"
        if values.setdefault("engine_output_type", kind) not in (kind, "latent"):
            raise ConfigError(
                f"stage {self.stage_id}: engine_output_type={values['engine_output_type']!r} but the stage's output is "
                f"{kind!r}",
                field="engine_args.engine_output_type",
            )
        values["async_chunk"] = self.async_chunk
        devices = values.pop("devices", None)
        if devices is not None and current_platform.is_cuda_alike():
            values["device_ids"] = _device_ids(self.stage_id, devices, values)
        values["stage_connector_config"] = {
            "name": "SharedMemoryConnector",
            "extra": {"shm_threshold_bytes": self.threshold},
        }
        return OmniEngineArgs.from_stage(self.stage_id, self.stage_type, values).create_engine_config()


_SET_ELSEWHERE = {
    "async_chunk": "it is a key of the stage configuration itself",
    "stage_connector_config": "name a connector in output_connectors",
}


def _device_ids(stage_id: int, devices: str, values: Mapping[str, Any]) -> list[int]:
    names = [name.strip() for name in devices.split(",")]
    ranks = values.get("tensor_parallel_size", 1)
    if not all(name.isdigit() for name in names) or len(names) != ranks:
        raise ConfigError(
            f"stage {stage_id}: devices={devices!r}: expected {ranks} index(es), one for each tensor-parallel rank",
            field="devices",
        )
    return [int(name) for name in names]


@dataclass
class ARStageHandle:
    """A running engine and vLLM's client of it."""

    spec: ARStageSpec
    config: VllmConfig
    client: AsyncMPClient
    info: StageInfo
    runtime: RuntimeDirectory
    """Its sockets and whatever else has a name."""
    processes: list[Any] = field(default_factory=list)
    """The engine's process."""

    @property
    def pid(self) -> int:
        """Process of the engine."""
        pid: int = self.processes[0].pid
        return pid

    def close(self, grace: float = GRACE) -> None:
        """End the engine; returns when its process is gone. Idempotent."""
        end_ar_stages([self], grace)


def end_ar_stages(handles: Sequence[ARStageHandle], grace: float = GRACE) -> None:
    """End engines, all at the same time; returns when their processes are gone. Idempotent."""
    for handle in handles:
        handle.client.resources.engine_dead = True  # expected from here on
    managers = [m for handle in handles if (m := handle.client.resources.engine_manager) is not None]
    threads = [threading.Thread(target=manager.shutdown, args=(grace,)) for manager in managers]
    for thread in threads:  # not two signals to a process: vLLM's second one can hang it
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.client.shutdown(timeout=grace)
        for process in handle.processes:
            process.join()
        handle.runtime.remove()


def launch_ar_stages(specs: Sequence[ARStageSpec], stage_timeout: float) -> list[ARStageHandle]:
    """Start every stage and wait for all of them.

    Raises:
        ConfigError: a stage's arguments are wrong; nothing was started then.
        DeadlineError: a stage took longer than ``stage_timeout`` seconds.
        StageDeadError: a stage's engine ended while it started.
    """
    return start_ar_stages([(spec, spec.config()) for spec in specs], stage_timeout)


def start_ar_stages(configs: list[tuple[ARStageSpec, VllmConfig]], stage_timeout: float) -> list[ARStageHandle]:
    """The second half of ``launch_ar_stages``."""
    handles: list[ARStageHandle] = []
    try:
        for group in _groups(configs):
            handles += _start_together(group, stage_timeout)
    except BaseException:
        end_ar_stages(handles, grace=0.5)
        raise
    return handles


def _groups(configs: list[tuple[ARStageSpec, VllmConfig]]) -> Iterator[list[tuple[ARStageSpec, VllmConfig]]]:
    """Stages that may start at the same time."""
    group: list[tuple[ARStageSpec, VllmConfig]] = []
    measured: set[int] = set()
    for spec, config in configs:
        devices: set[int] = set()
        if current_platform.is_cuda_alike() and config.cache_config.kv_cache_memory_bytes is None:
            ids = config.parallel_config.assigned_physical_gpu_ids
            devices = set(ids if ids is not None else range(config.parallel_config.world_size))
        if devices & measured:
            yield group
            group, measured = [], set()
        group.append((spec, config))
        measured |= devices
    if group:
        yield group


@dataclass
class _Starting:
    """An engine that has been started and may not be ready."""

    spec: ARStageSpec
    config: VllmConfig
    runtime: RuntimeDirectory
    launch: Any
    """vLLM's addresses and process manager."""
    barrier: contextlib.ExitStack
    """Waits for the engine when it is closed."""

    def give_up(self, error: BaseException) -> None:
        """End it because of ``error``; returns when its process is gone."""
        self.launch.engine_manager.shutdown(timeout=0.5)
        # Not close(): that would wait for the engine. This ends the waiting and frees its sockets.
        self.barrier.__exit__(type(error), error, error.__traceback__)
        for process in self.launch.engine_manager.processes:
            process.join()
        self.runtime.remove()


def _start_together(group: list[tuple[ARStageSpec, VllmConfig]], timeout: float) -> list[ARStageHandle]:
    starting: list[_Starting] = []
    handles: list[ARStageHandle] = []
    began = time.monotonic()
    try:
        for spec, config in group:
            starting.append(_start(spec, config))
        _wait_for_all(starting, began, timeout)
        for item in starting:
            handles.append(_connect(item))
    except BaseException as error:
        end_ar_stages(handles, grace=0.5)
        for item in starting[len(handles) :]:
            item.give_up(error)
        raise
    return handles


def _start(spec: ARStageSpec, config: VllmConfig) -> _Starting:
    """Start the process."""
    with contextlib.ExitStack() as failed:
        runtime = RuntimeDirectory()
        failed.callback(runtime.remove)
        config.model_config.runtime_path = str(runtime.path)
        barrier = contextlib.ExitStack()
        with runtime.entered(spec.env):
            addresses = get_engine_zmq_bind_addresses(config)
            launch = barrier.enter_context(
                launch_core_engines(
                    config,
                    Executor.get_class(config),
                    True,  # statistics: outputs say when a request was queued and scheduled
                    EngineZmqAddresses(inputs=list(addresses.inputs), outputs=list(addresses.outputs)),
                )
            )
        failed.pop_all()
    return _Starting(spec, config, runtime, launch, barrier)


def _wait_for_all(starting: list[_Starting], began: float, timeout: float) -> None:
    """Wait until every engine is ready or the first one fails.

    An engine begins to load when its parent answers it, so each has a thread that does.
    """
    pool = ThreadPoolExecutor(len(starting), thread_name_prefix="start-stage")
    waiting = [pool.submit(_wait, item, began, timeout) for item in starting]
    try:
        for done in as_completed(waiting):
            done.result()
    except BaseException:
        for item in starting:  # ends the waiting of the others
            item.launch.engine_manager.shutdown(timeout=0.5)
        raise
    finally:
        pool.shutdown()


def _wait(item: _Starting, began: float, timeout: float) -> None:
    """Wait until one engine is ready.

    Raises:
        DeadlineError: ``timeout`` is over; the engine was ended.
        StageDeadError: it ended by itself.
    """
    spec, processes = item.spec, item.launch.engine_manager.processes
    late = threading.Event()

    def kill() -> None:
        late.set()
        for process in processes:
            process.kill()

    timer = threading.Timer(max(began + timeout - time.monotonic(), 0.0), kill)
    timer.start()
    try:
        item.barrier.close()
        logger.info("stage %d ready after %.1f s", spec.stage_id, time.monotonic() - began)
    except (RuntimeError, TimeoutError) as error:
        if late.is_set():
            raise DeadlineError(
                f"stage {spec.stage_id} is not ready after {timeout:g} s (stage_init_timeout)",
                phase="start",
                stage_id=spec.stage_id,
            ) from error
        raise StageDeadError(
            f"the engine of stage {spec.stage_id} ended while it started; its log says why: {error}",
            stage_id=spec.stage_id,
        ) from error
    finally:
        timer.cancel()


def _connect(item: _Starting) -> ARStageHandle:
    """The client of an engine that is ready."""
    spec, config, launch = item.spec, item.config, item.launch
    processes = launch.engine_manager.processes
    addresses = {"input_address": launch.addresses.inputs[0], "output_address": launch.addresses.outputs[0]}
    client = AsyncMPClient(config, Executor.get_class(config), False, client_addresses=addresses)
    for process in processes:
        item.runtime.adopt(process.pid)
    client.resources.engine_manager = launch.engine_manager
    client.start_engine_core_monitor()
    return ARStageHandle(spec, config, client, _info(spec.stage_type, config, processes), item.runtime, processes)


def _info(stage_type: str, config: VllmConfig, processes: list[Any]) -> StageInfo:
    model = config.model_config
    facts = {
        "dtype": str(model.dtype),
        "max_model_len": model.max_model_len,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "kv_blocks": config.cache_config.num_gpu_blocks,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "information": [] if stage_type == "ar" and not model.takes_payload else None,
    }
    pids = [process.pid for process in processes]
    return StageInfo(model.architectures[0], config.parallel_config.world_size, pids, facts)
