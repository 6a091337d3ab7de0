"""Edges of Qwen2.5-Omni: thinker -> talker -> token2wav.

Both are called with everything at once, or again and again while the source stage runs; what they send is the same.

From the thinker come ``token_ids``, with the first output ``prompt_token_ids``, and for every position that it computed
the rows ``hidden.0`` (embeddings), ``hidden.-1`` (final states) and ``positions``; from the talker ``token_ids``, its
codes. The voice is the user's ``additional_information["speaker"]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_omni.errors import RequestError
from vllm_omni.inputs.edge import EdgeInput, information, reads, settings
from vllm_omni.model_executor.stage_input_processors.codec_chunks import ChunkSchedule, FrameStream

HIDDEN_LAYERS = (0, -1)
"""``hidden_layers`` of the thinker's stage."""
FLOW_SETTINGS = ("num_steps", "guidance_scale", "sway_coefficient")
"""Keys of the token2wav stage's ``extra_args``."""
DEFAULT_CHUNKS = {
    "initial_codec_chunk_frames": 8,
    "initial_codec_right_context_frames": 16,
    "codec_chunk_frames": 96,
    "codec_left_context_frames": 48,
    "codec_right_context_frames": 24,
}


@reads("speaker")
def thinker2talker(edge: EdgeInput) -> dict[str, Any] | None:
    """The talker's prompt as soon as the reply's first token has been read, then the rows of its further tokens.

    The talker hears every token that the thinker has read: all but the last one, which only ended the reply. A reply of
    no more than that last one leaves nothing to speak, and there is no talker.

    Raises:
        RequestError: the thinker sends no hidden states.
    """
    (outputs,) = edge.outputs.values()
    carry = edge.carry
    rows = carry.setdefault("rows", [])
    for output in outputs:
        if "prompt_token_ids" in output:
            carry.setdefault("prompt", list(output["prompt_token_ids"]))
        if "start" in output:
            rows.append(output)
    if not rows and not carry.get("open") and edge.last:
        names = [f"hidden.{layer}" for layer in HIDDEN_LAYERS]
        raise RequestError(
            f"the thinker sent no {' and '.join(names)}: its stage needs hidden_layers: {list(HIDDEN_LAYERS)}",
            field="hidden_layers",
        )
    if not carry.get("open"):
        if len(rows) < 2:
            return None
        carry["open"] = True
        first, carry["rows"] = rows[0], []
        length, talker = len(carry["prompt"]), edge.config.talker_config
        ends = [talker.tts_codec_pad_token_id, talker.tts_codec_start_token_id]
        info = {
            "prompt_token_ids": carry["prompt"],
            "prompt_hidden": first["hidden.-1"],
            "prompt_embeds": first["hidden.0"],
            "positions": first["positions"],
            "speaker": information(edge).get("speaker"),
            **_reply(rows[1:]),
        }
        prompt = [talker.tts_codec_mask_token_id] * length + ends
        return {"prompt_token_ids": prompt, "additional_information": info, "conditioning_steps": len(rows) - 2}
    if not rows:
        return None
    carry["rows"] = []
    talker = edge.config.talker_config
    return {
        "prompt_token_ids": [talker.tts_codec_pad_token_id],
        "additional_information": _reply(rows),
        "conditioning_steps": len(rows),
    }


def _reply(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Payload of reply tokens, one row each; rows may be tensors elsewhere, so they are not joined here."""
    return {"reply_hidden": [row["hidden.-1"] for row in rows], "reply_embeds": [row["hidden.0"] for row in rows]}


@reads("speaker", params=("seed", "extra_args"))
def talker2token2wav(edge: EdgeInput) -> dict[str, Any] | None:
    """The next window of codes when enough have come, as the ``codec_*`` keys of the connector's ``extra`` say.

    Windows start at the flow's blocks, so that a stream's blocks are those of the whole utterance. The sampling
    parameters of the token2wav stage may hold ``seed`` and, in ``extra_args``, ``FLOW_SETTINGS``.

    Raises:
        ConfigError: a key of ``extra`` has a wrong value.
        RequestError: an unknown key in ``extra_args``.
    """
    (outputs,) = edge.outputs.values()
    config = edge.config
    dit, talker = config.token2wav_config.dit_config, config.talker_config
    ends = (talker.tts_codec_pad_token_id, talker.tts_codec_end_token_id)
    codes = [code for output in outputs for code in output.get("token_ids") or () if code not in ends]
    stream: FrameStream[int] = edge.carry.setdefault("stream", FrameStream())
    schedule = ChunkSchedule.of(edge.extra, **DEFAULT_CHUNKS)
    window = stream.take(codes, schedule, edge.last, align=dit.block_size // dit.repeats)
    if window is None:
        return None
    info = {
        "codes": list(window.frames),
        "offset": window.start,
        "keep": [window.context, window.context + window.fresh],
        "speaker": information(edge).get("speaker"),
        **_flow_settings(edge),
    }
    return {"additional_information": info}


def _flow_settings(edge: EdgeInput) -> dict[str, Any]:
    out = settings(edge, *FLOW_SETTINGS)
    seed = edge.sampling_params.seed if edge.sampling_params is not None else None
    return out if seed is None else {**out, "seed": seed}
