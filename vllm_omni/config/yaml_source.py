"""Read YAML and remember the line of every value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vllm_omni.errors import ConfigError


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in file ``path``, and for each value's path (``stage_args[0].stage_id``) its ``file:line``.

    Raises:
        ConfigError: no such file, no YAML, a key that stands twice, or something else than a mapping on top.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field="stage_configs_path") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}", field="stage_configs_path") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys such as stage_args on top", field="stage_configs_path")
    lines: dict[str, str] = {}
    _collect(node, "", str(path), lines)
    return values, lines


def _collect(node: Any, path: str, file: str, lines: dict[str, str]) -> None:
    if path:
        lines[path] = f"{file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            where = f"{file}:{key.start_mark.line + 1}"
            if name in seen:
                raise ConfigError(f"{where}: key {name!r} stands twice", field=name)
            seen.add(name)
            below = f"{path}.{name}" if path else name
            _collect(value, below, file, lines)
            lines[below] = where
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect(value, f"{path}[{index}]", file, lines)
