"""Build a pipeline and put its weights in."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from vllm_omni.diffusion import registry
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.forward_context import set_forward_context
from vllm_omni.diffusion.model_loader.dummy import init_dummy_weights
from vllm_omni.diffusion.model_loader.utils import iterate_weights, weight_files
from vllm_omni.diffusion.models.common import weights as common_weights
from vllm_omni.diffusion.models.common.pipeline import DiTPipeline
from vllm_omni.diffusion.models.common.sampling import checkpoint_defaults
from vllm_omni.errors import ConfigError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)


class DiffusersPipelineLoader:
    """Makes the pipeline of a stage: by the registry, with random weights, or a class that the user names.

    A pipeline is built as ``cls(od_config=..., prefix="")`` on the target device in the model's dtype. Its
    ``weights_sources`` say which folders of the checkpoint go under which of its attributes; ``load_weights`` takes the
    tensors, one at a time, as they are mapped from the files to the device.
    """

    ComponentSource: ClassVar[type[common_weights.ComponentSource]] = common_weights.ComponentSource

    def __init__(self, od_config: OmniDiffusionConfig) -> None:
        self.od_config = od_config

    def load_model(self, device: torch.device) -> nn.Module:
        """The pipeline on ``device``, ready to run. ``init_parallel`` must have been called.

        Raises:
            ConfigError: an unknown pipeline, a setting it does not support, or a checkpoint that does not match.
        """
        started = time.perf_counter()
        pipeline_class = self._pipeline_class()
        registry.check_features(self.od_config)
        pipeline = self._build(pipeline_class, device)
        if isinstance(pipeline, DiTPipeline):
            pipeline.defaults = checkpoint_defaults(pipeline.defaults, pipeline.folder)
        if self.od_config.diffusion_load_format == "dummy":
            init_dummy_weights(pipeline)
        else:
            self._load(pipeline, device)
        _finish(pipeline)
        logger.info("%s loaded in %.1f s", pipeline_class.__name__, time.perf_counter() - started)
        return pipeline

    def _pipeline_class(self) -> type[nn.Module]:
        if self.od_config.diffusion_load_format != "custom_pipeline":
            return registry.resolve_pipeline_class(self.od_config)
        assert self.od_config.custom_pipeline_args is not None  # the configuration checked it
        name = self.od_config.custom_pipeline_args.get("pipeline_class")
        if isinstance(name, type):
            return name
        if not isinstance(name, str):
            raise ConfigError(
                f'custom_pipeline_args: "pipeline_class" is {name!r}; expected "module.Class"',
                field="custom_pipeline_args",
            )
        return resolve_class(name)

    def _build(self, pipeline_class: type[nn.Module], device: torch.device) -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.od_config.torch_dtype)
        try:
            with (
                set_forward_context(self.od_config, phase="load"),
                parallel_state.vllm_config_context(),
                torch.device(device),
                torch.no_grad(),
            ):
                return pipeline_class(od_config=self.od_config, prefix="").eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    def _load(self, pipeline: Any, device: torch.device) -> None:
        # Of the instance, or of the class; not every pipeline has it.
        sources = list(pipeline.weights_sources) if "weights_sources" in dir(pipeline) else []
        if not sources:
            return
        names: list[str] = []
        try:
            with torch.no_grad():
                loaded = set(pipeline.load_weights(self._tensors(sources, names, device)))
        except ConfigError:
            raise
        except ValueError as error:  # how vLLM's AutoWeightsLoader says that a tensor has no place
            raise ConfigError(f"{type(pipeline).__name__}.load_weights: {error}", field="model") from error
        missing = [
            name
            for name, _ in pipeline.named_parameters()
            if name not in loaded and any(name.startswith(source.prefix) for source in sources)
        ]
        unused = [name for name in names if name not in loaded and not _answers_for_itself(pipeline, name)]
        common_weights.check_complete(type(pipeline).__name__, missing, unused)

    def _tensors(
        self, sources: Iterable[common_weights.ComponentSource], names: list[str], device: torch.device
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for source in sources:
            files = weight_files(source.model_or_path, source.subfolder, source.revision, source.fall_back_to_pt)
            for name, tensor in iterate_weights(files, device):
                names.append(source.prefix + name)
                yield source.prefix + name, tensor


def resolve_class(qualified_name: str) -> type[nn.Module]:
    """Import ``module.Class``.

    Raises:
        ConfigError: the module cannot be imported, has no such name, or the name is not a class.
    """
    module_name, _, class_name = qualified_name.rpartition(".")
    where = f"custom_pipeline_args: pipeline_class={qualified_name!r}"
    if not module_name:
        raise ConfigError(f'{where}: expected "module.Class"', field="custom_pipeline_args")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{where}: cannot import {module_name}: {error}", field="custom_pipeline_args") from error
    found = vars(module).get(class_name)
    if found is None:
        raise ConfigError(f"{where}: {module_name} has no {class_name!r}", field="custom_pipeline_args")
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise ConfigError(f"{where}: not a class of torch.nn.Module", field="custom_pipeline_args")
    return found


def _answers_for_itself(pipeline: nn.Module, name: str) -> bool:
    """Whether a module on the way to tensor ``name`` has its own ``load_weights`` and may have renamed it.

    Our own pipelines and transformers check each tensor themselves.
    """
    if isinstance(pipeline, DiTPipeline):
        return True
    module: Any = pipeline
    for part in name.split(".")[:-1]:
        module = module._modules.get(part)
        if module is None:
            return False
        if "load_weights" in dir(type(module)):
            return True
    return False


def _finish(pipeline: nn.Module) -> None:
    """Let vLLM's layers prepare their weights for their kernels."""
    from vllm.model_executor.layers.linear import LinearBase

    for module in pipeline.modules():
        if isinstance(module, LinearBase):
            module.quant_method.process_weights_after_loading(module)
