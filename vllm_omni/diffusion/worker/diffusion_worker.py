"""The worker of one rank, its extensions, and the process it runs in when there are several.

``DiffusionWorker`` owns a rank's device, process groups and model. ``WorkerWrapperBase`` builds it, with the methods of
an extension class added. ``WorkerProc.worker_main`` is the main of a rank's process (executor ``mp``); executor
``uniproc`` holds a ``WorkerWrapperBase`` in the engine's process.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from vllm_omni.diffusion import ipc
from vllm_omni.diffusion.data import LoadFormat, OmniDiffusionConfig
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.profiler.torch_profiler import RankProfiler
from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner
from vllm_omni.errors import ConfigError, OmniError, RequestError, StageDeadError, StageError
from vllm_omni.logger import init_logger
from vllm_omni.platforms import get_platform

logger = init_logger(__name__)

DRAIN_S = 10.0
"""Seconds that a GPU may take to finish what it was given before a unit failed."""


class DiffusionWorker:
    """One rank of a diffusion stage: device, process groups, model runner, profiler."""

    def __init__(
        self, gpu_id: int, od_config: OmniDiffusionConfig, *, rank: int | None = None, init_method: str | None = None
    ) -> None:
        """
        Args:
            gpu_id: index of the rank's device on this host.
            od_config: configuration of the stage.
            rank: place in the stage; default ``gpu_id``.
            init_method: where the ranks meet; not needed for one rank.
        """
        self.od_config = od_config
        self.local_rank = gpu_id
        self.rank = gpu_id if rank is None else rank
        self.platform = get_platform(od_config.device_type)
        self.device = self.platform.device(gpu_id)
        self._grouped = False
        self._join_groups(init_method)
        self.model_runner = DiffusionModelRunner(od_config, self.device, rank=self.rank)
        self.profiler = RankProfiler(self.rank)

    def load_model(self, load_format: LoadFormat | None = None) -> None:
        """Load (or replace) the model; ``load_format`` goes before the configuration's."""
        self.model_runner.load_model(load_format=load_format)

    def execute(self, plan: ipc.StepPlan) -> ipc.StepResult:
        """Carry out a plan. A unit that fails is reported in ``StepResult.error``, and the worker goes on.

        With several ranks, a failed rank leaves its process groups (where that can be done at once), so that ranks that
        wait for it in a collective fail too instead of hanging; ``regroup`` must follow on every rank.

        Raises:
            StageDeadError: the device is lost; nothing can run on it any more.
        """
        try:
            return self.model_runner.execute(plan)
        except Exception as error:
            if isinstance(error, torch.AcceleratorError) and not _out_of_memory(error):
                raise StageDeadError(f"rank {self.rank}: {self.device} is lost: {error}", rank=self.rank) from error
            failed = self._unit_error(plan, error)
        # From here on the failed frames are gone, and with them the tensors and groups that they held.
        alone = self.od_config.parallel_config.world_size == 1
        if failed.out_of_memory or not alone:
            self.model_runner.free_caches()
        if not alone and self.platform.dist_backend == "gloo":
            self.leave_groups()
        result = ipc.StepResult(error=failed)
        self.model_runner.collect(result)
        return result

    def _unit_error(self, plan: ipc.StepPlan, error: Exception) -> ipc.UnitError:
        return ipc.UnitError(
            message=f"{type(error).__name__}: {error}",
            out_of_memory=_out_of_memory(error),
            untouched=self.model_runner.untouched(plan),
            traceback="".join(traceback.format_exception(error)),
            error=error.to_wire() if isinstance(error, OmniError) else None,
        )

    def regroup(self, init_method: str) -> None:
        """Make the process groups sound again after a failed unit; every rank calls it.

        gloo: leave the groups and meet again at ``init_method``. NCCL: a communicator is sound when every collective
        that was started has ended on every rank, which is so when the device drains; a rank whose device still waits
        for another rank cannot be saved.

        Raises:
            StageDeadError: the device did not finish its work.
        """
        if self.platform.dist_backend == "gloo":
            self.leave_groups()
            self._join_groups(init_method)
            return
        event = torch.cuda.Event()
        event.record()
        until = time.monotonic() + DRAIN_S
        while not event.query():
            if time.monotonic() > until:
                raise StageDeadError(
                    f"rank {self.rank}: still in a collective {DRAIN_S:.0f} s after another rank failed", rank=self.rank
                )
            time.sleep(0.001)

    def start_profile(self, folder: str) -> None:
        """Start a trace of this rank in ``folder``."""
        self.profiler.start(folder)

    def stop_profile(self) -> str:
        """Stop the trace; returns its path."""
        return self.profiler.stop()

    def facts(self) -> dict[str, Any]:
        """Plain values for logs and for the engine."""
        return {"device": str(self.device), "dtype": str(self.od_config.torch_dtype), **self.model_runner.facts}

    def shutdown(self) -> None:
        """Free the model and leave the process groups. Idempotent."""
        self.model_runner.unload_model()
        self.leave_groups()

    def _join_groups(self, init_method: str | None) -> None:
        parallel_state.init_parallel(
            self.od_config.parallel_config,
            rank=self.rank,
            local_rank=self.local_rank,
            init_method=init_method,
            backend=self.platform.dist_backend,
            timeout_s=self.od_config.dist_timeout,
        )
        self._grouped = True

    def leave_groups(self) -> None:
        """Leave the process groups. Idempotent."""
        if self._grouped:
            self._grouped = False
            parallel_state.destroy_parallel()


class CustomPipelineWorkerExtension:
    """Adds ``re_init_pipeline`` to a worker: its pipeline can be replaced by a class of the user's."""

    od_config: OmniDiffusionConfig
    model_runner: DiffusionModelRunner

    def re_init_pipeline(self, custom_pipeline_args: Mapping[str, Any]) -> None:
        """Free the pipeline there is and load ``custom_pipeline_args["pipeline_class"]`` with its real weights.

        Raises:
            ConfigError: the class cannot be imported, or the checkpoint does not fit it.
        """
        self.model_runner.unload_model()
        self.model_runner.od_config = replace(self.od_config, custom_pipeline_args=dict(custom_pipeline_args))
        self.model_runner.load_model(load_format="custom_pipeline")


class WorkerWrapperBase:
    """Builds a ``DiffusionWorker``, extended by the methods of other classes, and passes calls on to it.

    Attributes:
        worker: the worker, model loaded.
    """

    def __init__(
        self,
        gpu_id: int,
        od_config: OmniDiffusionConfig,
        worker_extension_cls: type | str | None = None,
        custom_pipeline_args: Mapping[str, Any] | None = None,
        *,
        rank: int | None = None,
        init_method: str | None = None,
    ) -> None:
        """
        Args:
            gpu_id: index of the rank's device on this host.
            od_config: configuration of the stage.
            worker_extension_cls: class (or its qualified name) whose methods the worker gets; default
                ``od_config.worker_extension_cls``.
            custom_pipeline_args: loads this pipeline in place of the model's own; default
                ``od_config.custom_pipeline_args``.
            rank: place in the stage; default ``gpu_id``.
            init_method: where the ranks meet; not needed for one rank.

        Raises:
            ConfigError: an extension that cannot be imported, or whose names the worker already has.
        """
        self.od_config = od_config
        self.worker_extension_cls = worker_extension_cls or od_config.worker_extension_cls
        self.custom_pipeline_args = custom_pipeline_args or od_config.custom_pipeline_args
        worker_class = self._prepare_worker_class()
        self.worker: DiffusionWorker = worker_class(gpu_id, od_config, rank=rank, init_method=init_method)
        if self.custom_pipeline_args:
            # The model's own pipeline would only be loaded to be thrown away.
            self.execute_method("re_init_pipeline", self.custom_pipeline_args)
        else:
            self.worker.load_model()

    def _prepare_worker_class(self) -> type[DiffusionWorker]:
        """``DiffusionWorker``, or a new class that inherits from it and from the extensions."""
        extensions: list[type] = []
        if self.worker_extension_cls is not None:
            extension = self.worker_extension_cls
            extensions.append(_import_extension(extension) if isinstance(extension, str) else extension)
        if self.custom_pipeline_args and not any(issubclass(cls, CustomPipelineWorkerExtension) for cls in extensions):
            extensions.insert(0, CustomPipelineWorkerExtension)
        if not extensions:
            return DiffusionWorker
        bases: list[type] = [DiffusionWorker]
        for extension in extensions:
            names = {name for name in dir(extension) if not name.startswith("__")}
            for base in bases:
                for name in sorted(names & set(dir(base))):
                    raise ConfigError(
                        f"worker_extension_cls={extension.__qualname__}: {name!r} is already a name of "
                        f"{base.__qualname__}; call it something else",
                        field="worker_extension_cls",
                    )
            bases.append(extension)
        name = "".join(extension.__name__ for extension in extensions) + DiffusionWorker.__name__
        return type(name, tuple(bases), {})

    def execute_method(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call ``method`` of the worker.

        Raises:
            RequestError: the worker has no such public method.
        """
        if method.startswith("_") or method not in dir(type(self.worker)):
            raise RequestError(f"the worker has no method {method!r}", field="method", value=method)
        return getattr(self.worker, method)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Only for names that the wrapper lacks; without this check an unfinished wrapper would ask itself forever.
        if name == "worker":
            raise AttributeError(name)
        return getattr(self.worker, name)


def _import_extension(qualified_name: str) -> type:
    module_name, _, class_name = qualified_name.rpartition(".")
    where = f"worker_extension_cls={qualified_name!r}"
    if not module_name:
        raise ConfigError(f'{where}: expected "module.Class"', field="worker_extension_cls")
    try:
        found = vars(importlib.import_module(module_name)).get(class_name)
    except ImportError as error:
        raise ConfigError(f"{where}: cannot import {module_name}: {error}", field="worker_extension_cls") from error
    if not isinstance(found, type):
        raise ConfigError(f"{where}: {module_name} has no class {class_name!r}", field="worker_extension_cls")
    return found


class WorkerProc:
    """One rank's process: answers the engine's messages one by one until it is told to stop."""

    def __init__(self, setup: ipc.RankSetup, connection: Connection) -> None:
        self._connection = connection
        self._wrapper = WorkerWrapperBase(
            setup.local_rank, setup.od_config, rank=setup.rank, init_method=setup.init_method
        )

    @staticmethod
    def worker_main(setup: ipc.RankSetup, connection: Connection) -> None:
        """Main of the process. Sends ``Ready`` or ``Failed``, then answers plans and calls.

        Args:
            setup: what to run.
            connection: messages to and from the engine.
        """
        # gloo listens on an interface; all ranks are on this host, so nobody else need reach it.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # vLLM's CPU collectives over shared memory spin, so nothing could call a rank back from one when another rank
        # fails. It falls back to gloo when the ranks' names for the shared memory differ.
        os.environ["VLLM_DIST_IDENT"] = f"rank{setup.rank}"
        try:
            proc = WorkerProc(setup, connection)
            ipc.send(connection, ipc.Ready(os.getpid(), proc._wrapper.facts()))
            proc._serve()
        except Exception as error:
            ipc.send(connection, _failed(error, setup.rank))
            raise
        # Not by way of the interpreter's tear-down, which takes seconds with torch and vLLM loaded.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _serve(self) -> None:
        while True:
            message = ipc.receive(self._connection)
            ipc.send(self._connection, self._answer(message))
            if isinstance(message, ipc.Stop):
                return

    def _answer(self, message: Any) -> Any:
        worker = self._wrapper.worker
        if isinstance(message, ipc.StepPlan):
            return worker.execute(message)
        if isinstance(message, ipc.Regroup):
            worker.regroup(message.init_method)
            return ipc.Returned()
        if isinstance(message, ipc.Call):
            try:
                return ipc.Returned(self._wrapper.execute_method(message.method, *message.args, **message.kwargs))
            except Exception as error:
                return _failed(error, worker.rank)
        # The process is about to end, which frees everything else faster than anything we could do.
        worker.leave_groups()
        return ipc.Returned()


def _out_of_memory(error: Exception) -> bool:
    """Whether ``error`` says that memory ran out; outside of torch's GPU allocator there is no class for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("out of memory" in str(error) or "DefaultCPUAllocator" in str(error))


def _failed(error: Exception, rank: int) -> ipc.Failed:
    text = "".join(traceback.format_exception(error))
    if isinstance(error, OmniError):
        wire = error.to_wire()
        return ipc.Failed({**wire, "details": {**wire["details"], "rank": rank, "cause": text}})
    return ipc.Failed(StageError(f"rank {rank}: {type(error).__name__}: {error}", rank=rank, cause=text).to_wire())
