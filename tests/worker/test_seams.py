"""Where vLLM is extended: every method that is overridden exists there and can be called as vLLM calls it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_omni.core.sched.omni_ar_scheduler import OmniARAsyncScheduler, OmniARScheduler
from vllm_omni.core.sched.omni_generation_scheduler import OmniGenerationScheduler
from vllm_omni.engine.output_processor import MultimodalOutputProcessor
from vllm_omni.worker.gpu_ar_model_runner import GPUARModelRunner
from vllm_omni.worker.gpu_ar_worker import GPUARWorker, GPUGenerationWorker
from vllm_omni.worker.gpu_generation_model_runner import GPUGenerationModelRunner

OURS = [
    (GPUARModelRunner, GPUModelRunner),
    (GPUGenerationModelRunner, GPUModelRunner),
    (GPUARWorker, Worker),
    (GPUGenerationWorker, Worker),
    (OmniARScheduler, Scheduler),
    (OmniARAsyncScheduler, Scheduler),
    (OmniGenerationScheduler, Scheduler),
    (MultimodalOutputProcessor, OutputProcessor),
]
OWN_PRIVATE = {
    "_attach", "_decode_rows", "_find_hooks", "_gated", "_generate", "_hidden_rows", "_join", "_read",
    "_rows", "_run", "_sample_all", "_sender", "_step", "_update_omni", "_write_embeddings",
}  # fmt: skip
"""Our own, not vLLM's."""
CONSTRUCTORS = {MultimodalOutputProcessor}
"""Built by this package alone, with arguments of their own."""


def overridden(ours: type[Any], base: type[Any]) -> dict[str, Any]:
    """Methods of ``base`` (vLLM's) that classes of this package above it replace."""
    found: dict[str, Any] = {}
    for cls in ours.__mro__:
        if not cls.__module__.startswith("vllm_omni"):
            continue
        for name, value in vars(cls).items():
            if inspect.isfunction(value) and hasattr(base, name) and not (name == "__init__" and ours in CONSTRUCTORS):
                found.setdefault(name, value)
    return found


@pytest.mark.parametrize(("ours", "base"), OURS, ids=lambda cls: cls.__name__)
def test_overrides_take_what_vllm_gives(ours: type[Any], base: type[Any]) -> None:
    methods = overridden(ours, base)
    assert methods
    for name, method in methods.items():
        theirs = inspect.signature(getattr(base, name)).parameters.values()
        positional = [object() for p in theirs if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        by_name = {
            p.name: object() for p in theirs if p.name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        only = {p.name: object() for p in theirs if p.kind is p.KEYWORD_ONLY}
        signature = inspect.signature(method)
        signature.bind(*positional, **only)
        signature.bind(object(), **by_name)


@pytest.mark.parametrize(("ours", "base"), OURS, ids=lambda cls: cls.__name__)
def test_private_seams_are_there(ours: type[Any], base: type[Any]) -> None:
    """A private method that vLLM renames would silently no longer be called."""
    for cls in ours.__mro__:
        if not cls.__module__.startswith("vllm_omni"):
            continue
        for name, value in vars(cls).items():
            if name.startswith("_") and not name.startswith("__") and inspect.isfunction(value):
                assert hasattr(base, name) or name in OWN_PRIVATE, f"{cls.__name__}.{name} is not vLLM's"


def test_named_seams() -> None:
    """What is read, not overridden."""
    assert hasattr(GPUModelRunner, "_init_mrope_positions")
    assert hasattr(GPUModelRunner, "_get_or_create_async_output_copy_stream")
    source = inspect.getsource(GPUModelRunner)
    for name in (
        "execute_model_state", "discard_request_mask", "use_aux_hidden_state_outputs", "query_start_loc",
        "is_token_ids",
    ):  # fmt: skip
        assert f"self.{name}" in source
    batch = inspect.getsource(InputBatch)
    for name in ("sampling_metadata", "token_ids_cpu", "req_id_to_index", "logitsprocs"):
        assert f"self.{name}" in batch
    assert "next_decode_eligible_step" in inspect.getsource(Scheduler.schedule)
