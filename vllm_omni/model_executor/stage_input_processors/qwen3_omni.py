"""Edges of Qwen3-Omni: thinker -> talker -> code2wav.

Both are called with everything at once, or again and again while the source stage runs; what they send is the same.

From the thinker come ``token_ids`` and, with the first output, ``prompt_token_ids``, and for prompts with media the
rows ``hidden.<layer>`` and ``positions`` of the prompt; from the talker ``codes``, one row of code groups a frame.
The voice is the user's ``additional_information["speaker"]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vllm_omni.errors import RequestError
from vllm_omni.inputs.edge import EdgeInput, information, reads
from vllm_omni.model_executor.stage_input_processors.codec_chunks import ChunkSchedule, FrameStream

DEFAULT_SPEAKER = "ethan"
ROLE_TOKENS = 3
"""Tokens of ``<|im_start|>assistant\\n``."""


@reads("speaker")
def thinker2talker(edge: EdgeInput) -> dict[str, Any] | None:
    """The talker's prompt with the first call, then the text that its next steps speak.

    The talker hears the user's turns, the header of the answer and the answer's tokens but the last one, which only
    ended it. An answer that the prompt begins is spoken from its beginning. With nothing to speak there is no talker.

    Raises:
        RequestError: an unknown speaker, or a prompt without the header of the answer.
    """
    (outputs,) = edge.outputs.values()
    config, carry = edge.config, edge.carry
    for output in outputs:
        carry.setdefault("prompt", list(output.get("prompt_token_ids") or ()))
        carry.setdefault("media", {}).update(_media(output, config))
        carry.setdefault("text", []).extend(output.get("token_ids") or ())
    if "answer" not in carry:
        carry["answer"] = _header(carry["prompt"], config) + ROLE_TOKENS
    answer = [*carry["prompt"][carry["answer"] :], *carry["text"]][: -1 if edge.last else None]
    spoken = carry.get("spoken", 0)
    info: dict[str, Any] = {}
    codec_pad = config.talker_config.codec_pad_id
    prompt = {"prompt_token_ids": [codec_pad]}
    if not spoken:
        if not answer:
            return None
        rows, text_ids, codec_ids = _prompt(carry["prompt"], carry["answer"], config, _speaker(edge))
        info |= _media_rows(carry["prompt"], rows, carry.pop("media"), config)
        info |= {"text_ids": _ids([*text_ids, answer[0]]), "codec_ids": _ids(codec_ids)}
        prompt = {"prompt_token_ids": [codec_pad] * len(codec_ids)}
        spoken = 1
    text = answer[spoken:]
    carry["spoken"] = spoken + len(text)
    if edge.last:
        text.append(config.tts_eos_token_id)
    if text:
        info["text"] = _ids(text)
    return {**prompt, "additional_information": info, "conditioning_steps": len(text)} if info else None


@reads(params=())
def talker2code2wav(edge: EdgeInput) -> dict[str, Any] | None:
    """The next window of frames when enough have come, as the ``codec_*`` keys of the connector's ``extra`` say.

    ``codec_left_context_frames`` defaults to what makes a stream's samples equal those of one run over all frames.

    Raises:
        ConfigError: a key of ``extra`` has a wrong value.
    """
    (outputs,) = edge.outputs.values()
    vocoder = edge.config.code2wav_config
    reach = vocoder.num_hidden_layers * (vocoder.sliding_window - 1) + CONV_CONTEXT
    schedule = ChunkSchedule.of(edge.extra, codec_left_context_frames=reach)
    stream: FrameStream[np.ndarray] = edge.carry.setdefault("stream", FrameStream())
    window = stream.take(_frames(outputs, vocoder.codebook_size), schedule, edge.last)
    if window is None:
        return None
    codes = torch.from_numpy(np.stack(window.frames).astype(np.int32))
    info = {"codes": codes, "context": window.context, "start": window.start}
    return {"additional_information": info}


CONV_CONTEXT = 11
"""Frames that the vocoder's convolutions look back over, and one for their look-ahead (``Vocoder.exact_context``)."""


def _frames(outputs: Sequence[Mapping[str, Any]], codebook_size: int) -> list[np.ndarray]:
    """Frames of the talker's outputs. A first code beyond the codebook ended the speech: it is no frame."""
    rows = [np.atleast_2d(np.asarray(output["codes"])) for output in outputs if "codes" in output]
    return [frame for block in rows for frame in block if frame[0] < codebook_size]


def _header(prompt: Sequence[int], config: Any) -> int:
    """Position of the header of the answer: the last turn of the assistant."""
    for at in range(len(prompt) - ROLE_TOKENS, -1, -1):
        if prompt[at] == config.im_start_token_id and prompt[at + 1] == config.assistant_token_id:
            return at
    raise RequestError(
        "to be spoken, a prompt must hold the header of the assistant's turn (add_generation_prompt)", field="prompt"
    )


def _prompt(prompt: Sequence[int], answer: int, config: Any, speaker: int) -> tuple[list[int], list[int], list[int]]:
    """(thinker positions of the user's turns, text tokens, codec tokens) of the talker's prompt.

    The text tokens lack the last one, the answer's first. ``answer`` is where the answer begins.
    """
    turns = [i for i, token in enumerate(prompt) if token == config.im_start_token_id]
    rows: list[int] = []
    for begin, end in zip(turns, [*turns[1:], len(prompt)], strict=True):
        if end - begin > 1 and prompt[begin + 1] == config.user_token_id:
            rows.extend(range(begin, end))
    talker = config.talker_config
    control = [talker.codec_nothink_id, talker.codec_think_bos_id, talker.codec_think_eos_id]
    codec = [*control, speaker, talker.codec_pad_id, talker.codec_bos_id]
    text = [prompt[row] for row in rows] + list(prompt[answer - ROLE_TOKENS : answer])
    text += [config.tts_pad_token_id] * (len(codec) - 2) + [config.tts_bos_token_id]
    return rows, text, [-1] * (len(rows) + ROLE_TOKENS) + codec


def _speaker(edge: EdgeInput) -> int:
    """Codec token of the voice."""
    voices: Mapping[str, int] = edge.config.talker_config.speaker_id
    wanted = information(edge).get("speaker")
    if wanted is None:
        return voices[DEFAULT_SPEAKER] if DEFAULT_SPEAKER in voices else next(iter(voices.values()))
    name = str(wanted).lower()
    if name not in voices:
        raise RequestError(
            f"speaker={wanted!r}: allowed are {', '.join(voices)}", field="speaker", value=wanted, allowed=list(voices)
        )
    return voices[name]


def _media(output: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The prompt's rows in an output of the thinker, as they are: they may be tensors elsewhere."""
    if output.get("start") != 0:
        return {}
    names = {f"hidden.{config.talker_config.accept_hidden_layer}": "hidden", "positions": "positions"}
    return {ours: output[theirs] for theirs, ours in names.items() if theirs in output}


def _media_rows(prompt: Sequence[int], rows: Sequence[int], media: dict[str, Any], config: Any) -> dict[str, Any]:
    """Payload for media in the user's turns; empty without any."""
    thinker = config.thinker_config
    kinds = {thinker.audio_token_id, thinker.image_token_id, thinker.video_token_id}
    marked = [prompt[row] in kinds for row in rows]
    if not any(marked):
        return {}
    if set(media) != {"hidden", "positions"}:
        layer = config.talker_config.accept_hidden_layer
        raise RequestError(
            f"the thinker sent no hidden states: its stage needs hidden_layers: [{layer}]", field="media"
        )
    return {**media, "rows": _ids(rows), "media": torch.tensor(marked)}


def _ids(tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64)
