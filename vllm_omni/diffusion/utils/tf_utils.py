"""Build a transformer from the keys of its checkpoint's config.json, without a second configuration class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from vllm_omni.errors import ConfigError


def get_transformer_config_kwargs(tf_model_config: Mapping[str, Any], model_class: type) -> dict[str, Any]:
    """The entries of a transformer's config.json that the constructor of ``model_class`` takes.

    Keys that open with an underscore are notes of diffusers. A key that the class does not take is left out when its
    value is null or when the class lists it in ``_unused_config_keys``; any other is an error, because it may change
    what the weights mean.

    Raises:
        ConfigError: names the keys that the class does not know.
    """
    parameters = inspect.signature(model_class).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unused: frozenset[str] = model_class.__dict__.get("_unused_config_keys", frozenset())
    kwargs = {key: value for key, value in tf_model_config.items() if key in parameters}
    unknown = [
        key
        for key, value in tf_model_config.items()
        if key not in parameters and not key.startswith("_") and value is not None and key not in unused
    ]
    if unknown and not takes_any:
        raise ConfigError(
            f"transformer/config.json: {', '.join(unknown)} not known to {model_class.__name__}", field="model"
        )
    return kwargs
