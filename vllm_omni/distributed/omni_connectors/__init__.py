"""Connectors: how payloads get from stage to stage."""

from vllm_omni.distributed.omni_connectors.base import OmniConnectorBase
from vllm_omni.distributed.omni_connectors.factory import OmniConnectorFactory
from vllm_omni.distributed.omni_connectors.shared_memory import SharedMemoryConnector

__all__ = ["OmniConnectorBase", "OmniConnectorFactory", "SharedMemoryConnector"]
