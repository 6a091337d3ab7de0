"""Configuration and result types of diffusion stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vllm_omni.config.schema import nearest, parse
from vllm_omni.errors import ConfigError

if TYPE_CHECKING:
    import torch  # not at run time: the command line reads the fields below for its --help

LoadFormat = Literal["default", "dummy", "custom_pipeline"]


@dataclass(frozen=True, kw_only=True)
class DiffusionParallelConfig:
    """How many ranks share one diffusion stage, and how. Sizes multiply to the number of processes."""

    tensor_parallel_size: int = 1
    """Ranks that share every weight matrix (vLLM's parallel linear layers)."""
    cfg_parallel_size: int = 1
    """Ranks that share the branches of classifier-free guidance; 1 or 2."""
    ulysses_degree: int = 1
    """Ranks that share the sequence by exchanging heads."""
    ring_degree: int = 1
    """Ranks that share the sequence by passing keys and values around."""
    sequence_parallel_size: int | None = None
    """``ulysses_degree * ring_degree``; given alone it means Ulysses."""
    pipeline_parallel_size: int = 1
    """Ranks that share the blocks."""
    data_parallel_size: int = 1
    """Copies of the stage."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1", field=name)
        if self.cfg_parallel_size > 2:
            raise ConfigError(
                f"cfg_parallel_size={self.cfg_parallel_size}: allowed are 1, 2", field="cfg_parallel_size"
            )
        degrees = self.ulysses_degree * self.ring_degree
        if self.sequence_parallel_size is None:
            object.__setattr__(self, "sequence_parallel_size", degrees)
        elif degrees == 1:
            object.__setattr__(self, "ulysses_degree", self.sequence_parallel_size)
        elif degrees != self.sequence_parallel_size:
            raise ConfigError(
                f"sequence_parallel_size={self.sequence_parallel_size} but "
                f"ulysses_degree * ring_degree = {self.ulysses_degree} * {self.ring_degree}",
                field="sequence_parallel_size",
            )

    @property
    def world_size(self) -> int:
        """Processes of the stage."""
        return (
            self.tensor_parallel_size
            * self.cfg_parallel_size
            * self.ulysses_degree
            * self.ring_degree
            * self.pipeline_parallel_size
            * self.data_parallel_size
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiffusionParallelConfig:
        """Build from plain values; an unknown key is a ``ConfigError``."""
        return parse(cls, values, "parallel_config")


@dataclass(frozen=True, kw_only=True)
class OmniDiffusionConfig:
    """Everything one diffusion stage is started with. Frozen: checked once by ``from_kwargs``, then trusted."""

    model: str
    """Folder of the checkpoint (or a hub name that the local cache holds)."""
    model_class_name: str | None = None
    """Pipeline class; default: ``_class_name`` of the checkpoint's model_index.json."""
    revision: str | None = None
    """Revision of a hub checkpoint."""
    trust_remote_code: bool = False
    """Whether code that comes with a checkpoint may run (tokenizers)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; ``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Kind of device; ``auto`` takes the GPU where there is one."""
    devices: str | None = None
    """Logical device indices of the stage's ranks, such as ``"0,1"``; default: the first ones."""
    diffusion_load_format: LoadFormat = "default"
    """``default`` loads the weights, ``dummy`` makes random ones, ``custom_pipeline`` loads the class that
    ``custom_pipeline_args`` names."""
    custom_pipeline_args: Mapping[str, Any] | None = None
    """``{"pipeline_class": "module.Class", ...}``: replaces the pipeline after the worker has started."""
    worker_extension_cls: str | None = None
    """Qualified name of a class whose methods the worker gets."""
    attention_backend: Literal["auto", "SDPA", "FLASH_ATTN"] = "auto"
    """Attention kernels; ``auto`` takes the fastest that the platform has."""
    parallel_config: DiffusionParallelConfig = field(default_factory=DiffusionParallelConfig)
    """How ranks share the stage."""
    distributed_executor_backend: Literal["auto", "uni", "mp"] = "auto"
    """``uni``: the worker lives in the engine process; ``mp``: one process a rank; ``auto``: by the number of ranks."""
    dist_timeout: float = 600.0
    """Seconds that a collective operation may take."""
    max_num_seqs: int = 8
    """Requests that are denoised together at most."""
    max_num_batched_tokens: int | None = None
    """Latent tokens that one denoise step may process at most; default: what the GPU's memory allows, as measured."""
    max_pixels: int | None = None
    """Pixels of one picture at most, and a quarter of those of all pictures of a request; default: 16 times the size
    that the model draws when it is not told."""
    enforce_eager: bool = False
    """Do not compile the repeated blocks (a CPU never does)."""
    vae_use_slicing: bool = False
    """Decode one picture at a time: less memory, more time."""
    vae_use_tiling: bool = False
    """Decode in overlapping tiles: less memory for large pictures, slightly different pixels."""
    gpu_memory_utilization: float = 0.9
    """Share of the device's memory that the stage may use; admission of requests counts with it."""
    default_seed: int | None = None
    """Seed of requests that bring none; without it each draws one."""

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs={self.max_num_seqs}: must be at least 1", field="max_num_seqs")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < 1:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: must be at least 1",
                field="max_num_batched_tokens",
            )
        if self.max_pixels is not None and self.max_pixels < 256:
            raise ConfigError(f"max_pixels={self.max_pixels}: must be at least 256", field="max_pixels")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization={self.gpu_memory_utilization}: must be in (0, 1]",
                field="gpu_memory_utilization",
            )
        if self.diffusion_load_format == "custom_pipeline" and not self.custom_pipeline_args:
            raise ConfigError(
                'diffusion_load_format="custom_pipeline" needs custom_pipeline_args={"pipeline_class": ...}',
                field="custom_pipeline_args",
            )
        if self.distributed_executor_backend == "uni" and self.parallel_config.world_size > 1:
            raise ConfigError(
                f'distributed_executor_backend="uni" has one rank but the parallel sizes ask for '
                f"{self.parallel_config.world_size}; use mp",
                field="distributed_executor_backend",
            )

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> OmniDiffusionConfig:
        """Build from keyword arguments; ``parallel_config`` may be a dictionary, parallel sizes may be given flat.

        Raises:
            ConfigError: an unknown or wrong argument.
        """
        values = dict(kwargs)
        parallel = values.pop("parallel_config", None)
        flat = {name: values.pop(name) for name in _PARALLEL_FIELDS if name in values}
        if isinstance(parallel, DiffusionParallelConfig):
            if flat:
                raise ConfigError(
                    f"{', '.join(flat)} given beside parallel_config; set them there", field="parallel_config"
                )
        else:
            parallel = DiffusionParallelConfig.from_dict({**(parallel or {}), **flat})
        known = (*cls.__dataclass_fields__, *_PARALLEL_FIELDS)
        for name in values:
            if name not in known:
                hint = INSTEAD[name] if name in INSTEAD else nearest(name, known)
                raise ConfigError(f"diffusion stage: unknown key {name!r}{hint}", field=name)
        return parse(cls, {**values, "parallel_config": parallel}, "diffusion stage")

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch knows it, ``auto`` resolved."""
        import torch

        if self.dtype == "auto":
            return torch.bfloat16 if self.device_type == "cuda" else torch.float32
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]

    @property
    def tf_model_config(self) -> dict[str, Any]:
        """The checkpoint's transformer/config.json, for constructors of transformers.

        Raises:
            ConfigError: the checkpoint or the file is missing.
        """
        from vllm_omni.diffusion.utils.checkpoint import model_folder, read_config

        return read_config(model_folder(self.model, self.revision), "transformer", "config.json")

    @property
    def device_type(self) -> str:
        """``device`` with ``auto`` resolved: ``cuda`` or ``cpu``."""
        import torch

        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    @property
    def executor_backend(self) -> str:
        """``distributed_executor_backend`` with ``auto`` resolved: ``uni`` or ``mp``."""
        if self.distributed_executor_backend == "auto":
            return "uni" if self.parallel_config.world_size == 1 else "mp"
        return self.distributed_executor_backend


# What users of the field may bring with them -> what to do here. The name follows "unknown key".
INSTEAD = {
    "load_format": "; use diffusion_load_format",
    "max_batch_size": "; use max_num_seqs",
    "device_map": "; use devices, or a parallel size: the model is not spread over devices by layers",
    "quantization": "; there is no quantisation yet, use dtype",
    "tokenizer": "; the tokenizers of the checkpoint are used",
    "output_type": "; it belongs to the sampling parameters of a request",
    "seed": "; it belongs to the sampling parameters of a request, or use default_seed",
    "step_execution": "; every model that can is run step by step",
    "stage_configs": "; give a file as stage_configs_path",
    "deploy_config": "; give a file as stage_configs_path",
    "use_fsdp_inference": "; use tensor_parallel_size",
    **dict.fromkeys(
        ("enable_cpu_offload", "enable_layerwise_offload", "layerwise_num_gpu_layers", "pin_cpu_memory"),
        "; there is no offloading yet, use tensor_parallel_size, vae_use_tiling or a smaller dtype",
    ),
    **dict.fromkeys(
        ("lora_path", "lora_scale", "static_lora_scale", "max_cpu_loras"), "; there are no adapters (LoRA) yet"
    ),
    **dict.fromkeys(("boundary_ratio", "flow_shift"), "; it belongs to video models, and there is none yet"),
    **dict.fromkeys(("enable_cache_dit_summary", "cache_strategy"), "; there are no caches that skip steps yet"),
    **dict.fromkeys(
        ("nccl_port", "master_port", "scheduler_port", "host", "port"),
        "; the ranks of a stage are on one host and find each other",
    ),
    **dict.fromkeys(("enable_sleep_mode", "omni_kv_config"), "; diffusion stages do not have it yet"),
    "log_level": "; set the environment variable VLLM_LOGGING_LEVEL",
}
_PARALLEL_FIELDS = tuple(DiffusionParallelConfig.__dataclass_fields__)


@dataclass
class DiffusionOutput:
    """What a pipeline's ``forward`` or ``decode`` returns. Positional order is part of the interface."""

    output: torch.Tensor | None = None
    """Pictures as the VAE gives them, [B, 3, H, W] in [-1, 1] (or latents); what post-processing takes."""
    trajectory_timesteps: torch.Tensor | None = None
    """Timesteps of the trajectory, [steps]."""
    trajectory_latents: torch.Tensor | None = None
    """Latents after each step, [steps, B, ...]."""
    trajectory_decoded: list[Any] | None = None
    """Pictures of the trajectory, where a pipeline makes them."""
    error: str | None = None
    """Why there is no output, for pipelines that report instead of raising."""
    post_process_func: Callable[..., Any] | None = None
    """Replaces the registered post-processing for this output."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Plain values to hand to the caller."""
