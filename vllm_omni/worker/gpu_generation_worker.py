"""Worker of a generation stage; see ``gpu_ar_worker``."""

from vllm_omni.worker.gpu_ar_worker import GPUGenerationWorker

__all__ = ["GPUGenerationWorker"]
