"""How speech and pictures stand in the answers of chats: OpenAI's way, or upstream's (``--compat upstream``)."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from vllm_omni.entrypoints.openai.images import encode_base64
from vllm_omni.entrypoints.openai.sound import encode_sound, pcm16, samples_of
from vllm_omni.outputs import OmniRequestOutput

AUDIO_LIFE_S = 3600


def image_parts(images: Sequence[Any]) -> list[dict[str, Any]]:
    """Pictures as parts of a message's content."""
    urls = [f"data:image/png;base64,{encode_base64(image)}" for image in images]
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


class OpenAIShape:
    """OpenAI's: ``message.audio`` and ``delta.audio`` with the text as transcript; pictures are parts of the content.

    Args:
        request_id: of the answer.
        created: its time.
        speaks: whether it is spoken.
        form: of whole sounds; pieces are 16-bit samples.
    """

    def __init__(self, request_id: str, created: int, speaks: bool, form: str) -> None:
        self._audio_id = "audio_" + request_id
        self._expires = created + AUDIO_LIFE_S
        self._speaks = speaks
        self._form = form

    def _encoded(self, output: OmniRequestOutput) -> str:
        samples, rate = samples_of(output.multimodal_output)
        return base64.b64encode(encode_sound(samples, rate, self._form)).decode()

    # ---------------------------------------------------------------- whole answers

    def finish_answer(self, answer: dict[str, Any], media: Sequence[OmniRequestOutput]) -> None:
        """Put what other stages made into an answer of vLLM's; words without sound have an empty one."""
        message = answer["choices"][0]["message"]
        if self._speaks:
            sounds = [output for output in media if "audio" in output.multimodal_output]
            message["audio"] = {
                "id": self._audio_id,
                "data": self._encoded(sounds[0]) if sounds else "",
                "expires_at": self._expires,
                "transcript": message["content"] or "",
            }
            message["content"] = None
        parts = [part for output in media for part in image_parts(output.images)]
        if parts:
            text = [{"type": "text", "text": message["content"]}] if message["content"] else []
            message["content"] = [*text, *parts]

    # ---------------------------------------------------------------- streams

    def chunk(self, delta: dict[str, Any]) -> dict[str, Any]:
        """What a chunk with ``delta`` has beside its head."""
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": None, "logprobs": None}]}

    def text(self, chunk: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """A chunk of vLLM's, for now, and for the end: what ends the text does not end the answer."""
        (choice,) = chunk["choices"]
        end = None
        if choice.get("finish_reason") is not None:
            end = {**chunk, "choices": [{**choice, "delta": {}, "logprobs": None}]}
            choice = {**choice, "finish_reason": None}
            choice.pop("stop_reason", None)
            delta = choice["delta"]
            if not delta.get("content") and not delta.get("tool_calls") and not choice.get("logprobs"):
                return None, end
        return {**chunk, "choices": [{**choice, "delta": self._delta(choice["delta"])}]}, end

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        if not self._speaks:
            return delta
        text = delta.pop("content", None)
        if "role" in delta:
            return {**delta, "content": None}
        return {**delta, "audio": {"id": self._audio_id, "transcript": text}} if text else delta

    def media_deltas(self, output: OmniRequestOutput) -> list[dict[str, Any]]:
        """What one output of another stage adds to a stream."""
        deltas: list[dict[str, Any]] = []
        if "audio" in output.multimodal_output:
            data = base64.b64encode(pcm16(samples_of(output.multimodal_output)[0])).decode()
            deltas.append({"audio": {"id": self._audio_id, "data": data}})
        if output.images:
            deltas.append({"content": image_parts(output.images)})
        return deltas

    def last_deltas(self) -> list[dict[str, Any]]:
        """What comes after everything."""
        return [{"audio": {"id": self._audio_id, "expires_at": self._expires}}] if self._speaks else []


class UpstreamShape(OpenAIShape):
    """Upstream's: a choice for the text and one for the sound; in a stream ``modality`` says what a chunk's
    ``delta.content`` holds, sound as files in base64."""

    def finish_answer(self, answer: dict[str, Any], media: Sequence[OmniRequestOutput]) -> None:
        for output in media:
            message: dict[str, Any] = {"role": "assistant", "content": None}
            if "audio" in output.multimodal_output:
                data = self._encoded(output)
                message["audio"] = {"id": self._audio_id, "data": data, "expires_at": self._expires, "transcript": ""}
            else:
                message["content"] = image_parts(output.images)
            index = len(answer["choices"])
            answer["choices"].append({"index": index, "message": message, "finish_reason": "stop", "logprobs": None})

    def chunk(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {**super().chunk(delta), "modality": "audio" if isinstance(delta["content"], str) else "image"}

    def text(self, chunk: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        return super().text({**chunk, "modality": "text"})

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return delta

    def media_deltas(self, output: OmniRequestOutput) -> list[dict[str, Any]]:
        if output.images:
            return [{"role": "assistant", "content": image_parts(output.images)}]
        return [{"role": "assistant", "content": self._encoded(output)}]

    def last_deltas(self) -> list[dict[str, Any]]:
        return []
