"""Mixture-of-experts layers of Qwen3-Omni as vLLM builds them, with random weights, outside of an engine."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.models.qwen3_moe import Qwen3MoeSparseMoeBlock

from vllm_omni.worker import moe_runner  # registers this package's runner of such layers


class Sizes(NamedTuple):
    """Of a layer."""

    hidden: int
    inner: int
    shared: int
    top_k: int
    renormalise: bool
    experts: int = 128


TALKER = Sizes(1024, 384, 768, 6, False)
THINKER = Sizes(2048, 768, 0, 8, True)


@contextlib.contextmanager
def one_rank(config: VllmConfig) -> Iterator[None]:
    """What vLLM's layers need around them: a configuration, and a group of this process alone."""
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        ours = not torch.distributed.is_initialized()
        if ours:
            # One process needs no NCCL, whose threads outlive the interpreter.
            init_distributed_environment(1, 0, f"file://{folder}/meet", 0, "gloo")
            initialize_model_parallel(backend="gloo")
        try:
            yield
        finally:
            if ours:
                destroy_model_parallel()
                destroy_distributed_environment()


@contextlib.contextmanager
def layers(sizes: Sizes, count: int, device: torch.device) -> Iterator[list[Qwen3MoeSparseMoeBlock]]:
    """``count`` layers in bfloat16, ready for calls with rows [R, hidden]; the kernels of this package are in use."""
    config = VllmConfig()
    cuda = device.type == "cuda"
    with one_rank(config):
        if cuda:
            from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

            if not is_workspace_manager_initialized():
                init_workspace_manager(device)
        text = SimpleNamespace(
            hidden_size=sizes.hidden,
            num_experts=sizes.experts,
            num_experts_per_tok=sizes.top_k,
            moe_intermediate_size=sizes.inner,
            shared_expert_intermediate_size=sizes.shared,
            norm_topk_prob=sizes.renormalise,
            hidden_act="silu",
        )
        model = SimpleNamespace(
            hf_text_config=text,
            dtype=torch.bfloat16,
            quantization=None,
            word_embeddings_untied_by_checkpoint=False,
        )
        whole = SimpleNamespace(model_config=model, parallel_config=config.parallel_config, quant_config=None)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                built = [Qwen3MoeSparseMoeBlock(whole, prefix=f"layers.{number}.mlp") for number in range(count)]
        finally:
            torch.set_default_dtype(usual)
        for block in built:
            for parameter in block.parameters():
                parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5)
            process_weights_after_loading(block, model, device)
            moe_runner.use_expert_kernels(block, device)
        with set_forward_context(None, config):
            yield built
