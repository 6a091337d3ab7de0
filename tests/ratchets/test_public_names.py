"""Names, module paths and signatures that users of the field rely on import from where they are expected.

A row counts from the moment its module exists, so that the table can be complete before the code is.
"""

import ast
import importlib
import inspect
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest

from tests.ratchets.source import all_names, bound_names, modules, names


@dataclass(frozen=True)
class Row:
    """A public name."""

    module: str
    name: str
    """``Class``, ``function`` or ``Class.method``."""
    parameters: tuple[str, ...] = ()
    """Parameters that it takes, in this order where they are positional; fields for a dataclass."""


_OMNI = "vllm_omni.entrypoints"
_DIFFUSION = "vllm_omni.diffusion"
_WORKER = f"{_DIFFUSION}.worker.diffusion_worker"
_CONNECTORS = "vllm_omni.distributed.omni_connectors"
ROWS = (
    Row(f"{_OMNI}.omni", "Omni", ("model",)),
    Row(f"{_OMNI}.omni", "Omni.generate", ("prompts", "sampling_params_list", "py_generator", "use_tqdm")),
    Row(f"{_OMNI}.omni", "Omni.start_profile", ("stages",)),
    Row(f"{_OMNI}.omni", "Omni.stop_profile", ("stages",)),
    Row(f"{_OMNI}.omni", "Omni.close"),
    Row(f"{_OMNI}.async_omni", "AsyncOmni", ("model",)),
    Row(f"{_OMNI}.async_omni", "AsyncOmni.generate", ("prompt", "request_id", "sampling_params_list")),
    Row(f"{_OMNI}.async_omni", "AsyncOmni.abort", ("request_id",)),
    Row("vllm_omni.outputs", "OmniRequestOutput", ("request_id", "finished", "stage_id", "final_output_type")),
    Row("vllm_omni.outputs", "OmniRequestOutput.from_pipeline", ("stage_id", "final_output_type", "request_output")),
    Row("vllm_omni.outputs", "OmniRequestOutput.from_diffusion", ("request_id", "images", "prompt", "metrics")),
    Row("vllm_omni.inputs.data", "OmniDiffusionSamplingParams", ("height", "width", "num_inference_steps", "seed")),
    Row("vllm_omni.inputs.data", "OmniPromptType"),
    Row("vllm_omni.inputs.data", "OmniSamplingParams"),
    Row("vllm_omni.config.model", "OmniModelConfig", ("stage_id", "async_chunk", "model_stage", "model_arch")),
    Row(f"{_DIFFUSION}.data", "OmniDiffusionConfig", ("model", "model_class_name", "dtype", "parallel_config")),
    Row(f"{_DIFFUSION}.data", "OmniDiffusionConfig.from_kwargs"),
    Row(f"{_DIFFUSION}.data", "DiffusionParallelConfig", ("tensor_parallel_size", "cfg_parallel_size")),
    Row(f"{_DIFFUSION}.data", "DiffusionParallelConfig.from_dict"),
    Row(
        f"{_DIFFUSION}.data",
        "DiffusionOutput",
        (
            "output",
            "trajectory_timesteps",
            "trajectory_latents",
            "trajectory_decoded",
            "error",
            "post_process_func",
        ),
    ),
    Row(f"{_DIFFUSION}.request", "OmniDiffusionRequest", ("prompts", "sampling_params", "request_ids")),
    Row(f"{_DIFFUSION}.diffusion_engine", "DiffusionEngine", ("od_config",)),
    Row(f"{_DIFFUSION}.diffusion_engine", "DiffusionEngine.step"),
    Row(f"{_DIFFUSION}.scheduler", "Scheduler"),
    Row(f"{_DIFFUSION}.registry", "_DIFFUSION_MODELS"),
    Row(f"{_DIFFUSION}.registry", "_DIFFUSION_POST_PROCESS_FUNCS"),
    Row(f"{_DIFFUSION}.registry", "_DIFFUSION_PRE_PROCESS_FUNCS"),
    Row(f"{_DIFFUSION}.registry", "get_diffusion_post_process_func", ("od_config",)),
    Row(f"{_DIFFUSION}.registry", "get_diffusion_pre_process_func", ("od_config",)),
    Row(f"{_DIFFUSION}.attention.layer", "Attention", ("num_heads", "head_size", "softmax_scale", "causal")),
    Row(f"{_DIFFUSION}.attention.layer", "Attention.forward", ("attn_metadata",)),
    Row(f"{_DIFFUSION}.attention.backends.abstract", "AttentionMetadata", ("attn_mask",)),
    Row(
        f"{_DIFFUSION}.distributed.parallel_state",
        "initialize_model_parallel",
        (
            "data_parallel_size",
            "cfg_parallel_size",
            "sequence_parallel_size",
            "tensor_parallel_size",
            "pipeline_parallel_size",
        ),
    ),
    Row(f"{_DIFFUSION}.distributed.cfg_parallel", "CFGParallelMixin"),
    Row(f"{_DIFFUSION}.distributed.utils", "get_local_device"),
    Row(f"{_DIFFUSION}.layers.adalayernorm", "AdaLayerNorm"),
    Row(f"{_DIFFUSION}.layers.rope", "RotaryEmbedding"),
    Row(f"{_DIFFUSION}.utils.tf_utils", "get_transformer_config_kwargs"),
    Row(f"{_DIFFUSION}.models.interface", "SupportsStepExecution"),
    Row(f"{_DIFFUSION}.models.flux.pipeline_flux", "FluxPipeline", ("od_config", "prefix")),
    Row(f"{_DIFFUSION}.models.flux.pipeline_flux", "FluxPipeline.forward", ("req", "prompt", "negative_prompt")),
    Row(f"{_DIFFUSION}.models.flux.pipeline_flux", "get_flux_post_process_func", ("od_config",)),
    Row(f"{_DIFFUSION}.models.qwen_image.pipeline_qwen_image", "QwenImagePipeline", ("od_config", "prefix")),
    Row(f"{_DIFFUSION}.models.qwen_image.pipeline_qwen_image", "get_qwen_image_post_process_func", ("od_config",)),
    Row(f"{_DIFFUSION}.models.qwen_image.pipeline_qwen_image_edit", "QwenImageEditPipeline", ("od_config", "prefix")),
    Row(f"{_DIFFUSION}.model_loader.diffusers_loader", "DiffusersPipelineLoader"),
    Row(
        f"{_DIFFUSION}.model_loader.diffusers_loader",
        "DiffusersPipelineLoader.ComponentSource",
        ("model_or_path", "subfolder", "revision", "prefix", "fall_back_to_pt"),
    ),
    Row(f"{_DIFFUSION}.model_loader.utils", "download_weights_from_hf_specific"),
    Row(_WORKER, "DiffusionWorker"),
    Row(_WORKER, "WorkerWrapperBase", ("gpu_id", "od_config", "worker_extension_cls")),
    Row(_WORKER, "WorkerProc.worker_main"),
    Row(_WORKER, "CustomPipelineWorkerExtension.re_init_pipeline", ("custom_pipeline_args",)),
    Row(f"{_DIFFUSION}.worker.diffusion_model_runner", "DiffusionModelRunner.load_model"),
    Row(f"{_CONNECTORS}.base", "OmniConnectorBase.put", ("from_stage", "to_stage", "put_key", "data")),
    Row(f"{_CONNECTORS}.base", "OmniConnectorBase.get", ("from_stage", "to_stage", "get_key", "metadata")),
    Row(f"{_CONNECTORS}.base", "OmniConnectorBase.cleanup", ("request_id",)),
    Row(f"{_CONNECTORS}.base", "OmniConnectorBase.health"),
    Row(f"{_CONNECTORS}.base", "OmniConnectorBase.close"),
    Row(f"{_CONNECTORS}.factory", "OmniConnectorFactory.register_connector"),
    Row(f"{_CONNECTORS}.factory", "OmniConnectorFactory.create_connector"),
    Row(f"{_CONNECTORS}.factory", "OmniConnectorFactory.list_registered_connectors"),
)


def _resolve(row: Row) -> Any:
    value: Any = importlib.import_module(row.module)
    for part in row.name.split("."):
        assert part in dir(value), f"{row.module} has no {row.name}"
        value = getattr(value, part)
    return value


LANDED = [row for row in ROWS if row.module in names()]


@pytest.mark.parametrize("row", LANDED, ids=lambda row: row.name)
def test_name_imports_with_its_signature(row: Row) -> None:
    value = _resolve(row)
    if not row.parameters:
        return
    if is_dataclass(value):
        found = [f.name for f in fields(value)]
        assert tuple(found[: len(row.parameters)]) == row.parameters or set(row.parameters) <= set(found)
        return
    found = [name for name in inspect.signature(value).parameters if name != "self"]
    assert [name for name in found if name in row.parameters] == list(row.parameters), f"{row.name}{tuple(found)}"


def test_positional_order_of_the_pipeline_output() -> None:
    """Pipelines outside the package construct it positionally."""
    row = next(row for row in ROWS if row.name == "DiffusionOutput")
    assert tuple(f.name for f in fields(_resolve(row)))[: len(row.parameters)] == row.parameters


def test_lazy_names_of_the_package_import() -> None:
    package = importlib.import_module("vllm_omni")
    for name in package.__all__:
        module = package._LAZY.get(name)
        if module is None or module in names():
            assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Omin'"):
        _ = package.Omin


def test_all_lists_what_there_is() -> None:
    """Every name of an ``__all__`` exists, and a package's ``__init__`` lists everything public that it imports."""
    wrong = []
    for module in modules():
        listed = all_names(module)
        if not listed:
            continue
        bound = bound_names(module)
        lazy = set(importlib.import_module(module.name)._LAZY) if "_LAZY" in bound else set()
        missing = listed - bound - lazy
        imported = {
            alias.asname or alias.name
            for node in module.tree.body
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm_omni.")
            if node.module != "vllm_omni.lazy"
            for alias in node.names
        }
        hidden = imported - listed if module.path.name == "__init__.py" else set()
        wrong += [f"{module.name}: {name} is listed but does not exist" for name in sorted(missing)]
        wrong += [f"{module.name}: {name} is imported but not listed" for name in sorted(hidden)]
    assert not wrong, "\n".join(wrong)
