"""Connectors by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_omni.config.schema import nearest
from vllm_omni.config.stage import ConnectorConfig
from vllm_omni.distributed.omni_connectors.base import OmniConnectorBase
from vllm_omni.distributed.omni_connectors.shared_memory import SharedMemoryConnector
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.edge import EDGE_SETTINGS

ConnectorMaker = Callable[..., OmniConnectorBase]


class OmniConnectorFactory:
    """Makes connectors from what a stage configuration says. Out-of-tree connectors register themselves."""

    _makers: dict[str, ConnectorMaker] = {"SharedMemoryConnector": SharedMemoryConnector}  # noqa: RUF012 - the registry

    @classmethod
    def register_connector(cls, name: str, maker: ConnectorMaker) -> None:
        """Add a connector class (or a function that makes one) under ``name``.

        Raises:
            ConfigError: the name is taken.
        """
        if name in cls._makers:
            raise ConfigError(f"a connector {name!r} is registered already", field="name")
        cls._makers[name] = maker

    @classmethod
    def create_connector(cls, config: ConnectorConfig | Mapping[str, Any]) -> OmniConnectorBase:
        """Make the connector of ``config`` (``{"name": ..., "extra": {...}}``).

        Raises:
            ConfigError: no such connector, or an argument that it does not take.
        """
        if not isinstance(config, ConnectorConfig):
            config = ConnectorConfig(**config)
        maker = cls.maker(config.name)
        known = inspect.signature(maker).parameters
        for key in config.extra:
            if key not in known and key not in EDGE_SETTINGS:
                raise ConfigError(
                    f"{config.name}: unknown argument {key!r}{nearest(key, {*known, *EDGE_SETTINGS})}", field=key
                )
        return maker(**{key: value for key, value in config.extra.items() if key in known})

    @classmethod
    def maker(cls, name: str) -> ConnectorMaker:
        """What makes connector ``name``; raises ``ConfigError`` when there is none."""
        if name not in cls._makers:
            raise ConfigError(
                f"no connector {name!r}; there are {', '.join(cls.list_registered_connectors())}", field="connectors"
            )
        return cls._makers[name]

    @classmethod
    def list_registered_connectors(cls) -> list[str]:
        """Names of all connectors."""
        return sorted(cls._makers)


def stage_threshold(stage_id: int, connectors: Sequence[ConnectorConfig], default: int) -> int:
    """Size in bytes above which leaves of a stage's outputs go to shared memory.

    An output is written once, whoever reads it, so that all connectors of one stage have to agree.

    Raises:
        ConfigError: a connector that does not exist or is no shared memory, or two thresholds for one stage.
    """
    thresholds = set()
    for config in connectors:
        OmniConnectorFactory.create_connector(config).close()
        if config.name != "SharedMemoryConnector":
            raise ConfigError(
                f"stage {stage_id}: connector {config.name} cannot carry the outputs of a stage process of this host; "
                "use SharedMemoryConnector",
                field="output_connectors",
            )
        thresholds.add(int(config.extra.get("shm_threshold_bytes", default)))
    if len(thresholds) > 1:
        raise ConfigError(
            f"stage {stage_id}: its output connectors have different shm_threshold_bytes {sorted(thresholds)}; an "
            "output is written once for all its readers",
            field="output_connectors",
        )
    return thresholds.pop() if thresholds else default
