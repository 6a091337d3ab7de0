"""Settings of what vLLM's server does: chat templates, parsers of tools and reasoning, adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from vllm_omni.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TextArgs:
    """Settings of chats and texts, by the names of vLLM's server. Only for models that make text."""

    chat_template: str | None = None
    """File with the chat template (Jinja), or the template itself. Default: the checkpoint's."""
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    """How a template gets a message's content: as text, as a list of parts, or as the template looks like."""
    trust_request_chat_template: bool = False
    """Let requests bring a template of their own."""
    trust_request_mm_kwargs: bool = False
    """Let requests set mm_processor_kwargs, which may make the reading of media expensive."""
    default_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template; those of a request win."""
    response_role: str = "assistant"
    """Role of the answers."""
    enable_auto_tool_choice: bool = False
    """Let the model decide whether it calls a tool; needs --tool-call-parser."""
    tool_call_parser: str | None = None
    """Parser of the calls that the model writes, by vLLM's name of it (hermes, qwen3_coder, ...)."""
    tool_strict_level: Literal["auto", "function", "parameter"] = "auto"
    """How far a grammar binds calls: as the request says, the call's form, or its arguments, too."""
    exclude_tools_when_tool_choice_none: bool = False
    """Leave the tools out of the prompt when tool_choice is none."""
    reasoning_parser: str | None = None
    """Parser that takes the model's reasoning out of the answer, by vLLM's name of it (qwen3, deepseek_r1, ...)."""
    return_tokens_as_token_ids: bool = False
    """Show the tokens of log probabilities as token_id:N."""
    enable_prompt_tokens_details: bool = False
    """Tell in the usage how many tokens of the prompt came from the cache, and how many stand for media."""
    enable_force_include_usage: bool = False
    """End every stream with its usage."""
    lora_modules: Sequence[str] = ()
    """Adapters that requests may name as model: name=path."""

    def __post_init__(self) -> None:
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ConfigError("enable_auto_tool_choice needs tool_call_parser", field="enable_auto_tool_choice")
        if self.tool_call_parser is not None and not self.enable_auto_tool_choice:
            raise ConfigError("tool_call_parser needs enable_auto_tool_choice", field="tool_call_parser")
        self.adapters()

    def adapters(self) -> dict[str, str]:
        """Paths by name.

        Raises:
            ConfigError: not ``name=path``, a name twice, no adapter there.
        """
        found: dict[str, str] = {}
        for text in self.lora_modules:
            name, equals, path = text.partition("=")
            if not equals or not name or name in found:
                raise ConfigError(f"lora_modules: {text!r}: expected name=path, each name once", field="lora_modules")
            if not (Path(path) / "adapter_config.json").is_file():
                raise ConfigError(f"lora_modules: {name}: no adapter_config.json in {path!r}", field="lora_modules")
            found[name] = path
        return found

    def given(self) -> list[str]:
        """Fields that do not have their default."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(TextArgs(), f.name)]

    def check_parsers(self) -> None:
        """Find out before a process is started that vLLM has no such parser or template.

        Raises:
            ConfigError: names the field.
        """
        if self.chat_template is not None:
            self.template()
        if self.tool_call_parser is not None:
            from vllm.tool_parsers import ToolParserManager

            _check_name("tool_call_parser", self.tool_call_parser, ToolParserManager.list_registered())
        if self.reasoning_parser is not None:
            from vllm.reasoning import ReasoningParserManager

            _check_name("reasoning_parser", self.reasoning_parser, ReasoningParserManager.list_registered())

    def template(self) -> str | None:
        """The chat template's text; None for the checkpoint's own.

        Raises:
            ConfigError: neither a file nor a template.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.renderers.chat_utils import load_chat_template

        try:
            template: str | None = load_chat_template(self.chat_template)
        except (VLLMClientError, ValueError, OSError) as error:
            raise ConfigError(f"chat_template: {error}", field="chat_template") from error
        return template


def _check_name(field_name: str, name: str | None, known: Sequence[str]) -> None:
    from vllm_omni.config.schema import nearest

    if name is not None and name not in known:
        raise ConfigError(f"{field_name}={name!r}: vLLM has no such parser{nearest(name, known)}", field=field_name)
