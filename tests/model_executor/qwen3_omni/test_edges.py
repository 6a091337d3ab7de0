"""The edge functions, without a model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_omni.errors import ConfigError, RequestError
from vllm_omni.inputs.edge import EdgeInput
from vllm_omni.model_executor.models.qwen3_omni.talker import talker_positions
from vllm_omni.model_executor.stage_input_processors.qwen3_omni import talker2code2wav, thinker2talker

START, END, USER, SYSTEM, ASSISTANT, LINE = 1, 2, 3, 4, 5, 6
IMAGE, AUDIO, VIDEO = 7, 8, 9
PAD, BOS, EOS = 90, 91, 92
NOTHINK, THINK_BOS, THINK_EOS, CODEC_PAD, CODEC_BOS, CHELSIE, ETHAN = 201, 202, 203, 204, 205, 206, 207
CONFIG = SimpleNamespace(
    im_start_token_id=START,
    user_token_id=USER,
    assistant_token_id=ASSISTANT,
    tts_pad_token_id=PAD,
    tts_bos_token_id=BOS,
    tts_eos_token_id=EOS,
    thinker_config=SimpleNamespace(image_token_id=IMAGE, audio_token_id=AUDIO, video_token_id=VIDEO),
    talker_config=SimpleNamespace(
        accept_hidden_layer=3,
        codec_nothink_id=NOTHINK,
        codec_think_bos_id=THINK_BOS,
        codec_think_eos_id=THINK_EOS,
        codec_pad_id=CODEC_PAD,
        codec_bos_id=CODEC_BOS,
        speaker_id={"chelsie": CHELSIE, "ethan": ETHAN},
    ),
    code2wav_config=SimpleNamespace(codebook_size=128, num_hidden_layers=2, sliding_window=6),
)
HEADER = [START, ASSISTANT, LINE]
ASK = [START, USER, LINE, 40, 41, END, LINE]
PROMPT = [START, SYSTEM, LINE, 30, END, LINE, *ASK, *HEADER]
CONTROL = [NOTHINK, THINK_BOS, THINK_EOS, ETHAN, CODEC_PAD, CODEC_BOS]


def cross(function: Any, outputs: list[dict[str, Any]], prompt: Any = "hi", **values: Any) -> Any:
    return function(EdgeInput("r", {0: outputs}, prompt, None, config=CONFIG, **values))


def info(prompt: Any) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in prompt["additional_information"].items()}


def test_the_talkers_prompt() -> None:
    made = cross(thinker2talker, [{"prompt_token_ids": PROMPT, "token_ids": [50, 51, 52, END]}])
    assert info(made) == {
        "text_ids": [*ASK, *HEADER, PAD, PAD, PAD, PAD, BOS, 50],
        "codec_ids": [-1] * (len(ASK) + 3) + CONTROL,
        "text": [51, 52, EOS],
    }
    assert made["prompt_token_ids"] == [CODEC_PAD] * (len(ASK) + 9)
    assert made["conditioning_steps"] == 3


def test_text_that_comes_in_pieces_is_the_same_text() -> None:
    carry: dict[str, Any] = {}
    outputs = [{"token_ids": [token]} for token in (50, 51, 52, END)]
    outputs[0]["prompt_token_ids"] = PROMPT
    made = [
        cross(thinker2talker, [output], chunk=i, last=i == len(outputs) - 1, carry=carry)
        for i, output in enumerate(outputs)
    ]
    assert info(made[0])["text_ids"][-1] == 50
    assert [part["conditioning_steps"] for part in made] == [0, 1, 1, 1]
    assert [token for part in made for token in info(part).get("text", [])] == [51, 52, EOS]


def test_an_answer_that_the_prompt_begins_is_spoken_from_its_beginning() -> None:
    made = info(cross(thinker2talker, [{"prompt_token_ids": [*PROMPT, 60, 61], "token_ids": [50, END]}]))
    assert made["text_ids"][-6:] == [PAD, PAD, PAD, PAD, BOS, 60]
    assert made["text"] == [61, 50, EOS]


def test_nothing_to_speak() -> None:
    assert cross(thinker2talker, [{"prompt_token_ids": PROMPT, "token_ids": [END]}]) is None
    carry: dict[str, Any] = {}
    assert cross(thinker2talker, [{"prompt_token_ids": PROMPT, "token_ids": []}], last=False, carry=carry) is None
    assert cross(thinker2talker, [{"token_ids": [END]}], carry=carry) is None


def test_all_turns_of_the_user_and_no_other() -> None:
    prompt = [*ASK, START, ASSISTANT, LINE, 70, END, LINE, *ASK[:3], 42, END, LINE, *HEADER]
    made = info(cross(thinker2talker, [{"prompt_token_ids": prompt, "token_ids": [50, END]}]))
    assert made["text_ids"][: len(ASK) + 6] == [*ASK, *ASK[:3], 42, END, LINE]


def test_media_rows_travel_untouched() -> None:
    prompt = [*ASK[:3], IMAGE, IMAGE, AUDIO, 40, END, LINE, *HEADER]
    hidden, positions = object(), object()  # tensors somewhere else
    rows = {"start": 0, "hidden.3": hidden, "hidden.0": object(), "positions": positions}
    first = {"prompt_token_ids": prompt, "token_ids": [50], **rows}
    later = {"token_ids": [END], "start": len(prompt), "hidden.3": object(), "positions": object()}
    made = cross(thinker2talker, [first, later])["additional_information"]
    assert made["hidden"] is hidden
    assert made["positions"] is positions
    assert made["rows"].tolist() == list(range(9))
    assert made["media"].tolist() == [False] * 3 + [True] * 3 + [False] * 3
    text_only = cross(thinker2talker, [{"prompt_token_ids": PROMPT, "token_ids": [50, END], **rows}])
    assert set(text_only["additional_information"]) == {"text_ids", "codec_ids", "text"}


def test_a_voice() -> None:
    output = {"prompt_token_ids": PROMPT, "token_ids": [50, END]}

    def voiced(name: Any) -> Any:
        return cross(thinker2talker, [output], {"prompt": "hi", "additional_information": {"speaker": name}})

    assert info(voiced("Chelsie"))["codec_ids"][-3] == CHELSIE
    with pytest.raises(RequestError, match="allowed are chelsie, ethan") as error:
        voiced("nobody")
    assert error.value.details["field"] == "speaker"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([30, 31], "header of the assistant's turn"), ([*ASK[:3], IMAGE, *HEADER], r"hidden_layers: \[3\]")],
)
def test_prompts_that_cannot_be_spoken(prompt: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        cross(thinker2talker, [{"prompt_token_ids": prompt, "token_ids": [50, END]}])


def frames(*firsts: int) -> list[dict[str, Any]]:
    return [{"codes": torch.tensor([first, *range(15)], dtype=torch.int32)} for first in firsts]


def test_frames_end_with_the_end_of_speech() -> None:
    made = info(cross(talker2code2wav, frames(5, 6, 7, 150)))
    assert [frame[0] for frame in made["codes"]] == [5, 6, 7]
    assert (made["context"], made["start"]) == (0, 0)
    assert cross(talker2code2wav, frames(150)) is None
    assert cross(talker2code2wav, []) is None


def test_windows_of_a_stream() -> None:
    """Sizes 2, 4, 4, ... with six frames of context; the end brings what is left."""
    extra = {"codec_chunk_frames": 4, "initial_codec_chunk_frames": 2, "codec_left_context_frames": 6}
    carry: dict[str, Any] = {}
    firsts = [*range(15), 150]
    made = [
        cross(talker2code2wav, frames(first), chunk=i, last=i == 15, carry=carry, extra=extra)
        for i, first in enumerate(firsts)
    ]
    windows = [
        (w["start"], w["context"], [frame[0] for frame in w["codes"]]) for w in (info(m) for m in made if m is not None)
    ]
    assert windows == [
        (0, 0, [0, 1]),
        (0, 2, list(range(6))),
        (0, 6, list(range(10))),
        (4, 6, list(range(4, 14))),
        (8, 6, list(range(8, 15))),
    ]


def test_the_default_context_is_exact() -> None:
    carry: dict[str, Any] = {}
    made = [cross(talker2code2wav, frames(1), last=False, carry=carry) for _ in range(120)]
    assert max(info(m)["context"] for m in made if m is not None) == 2 * 5 + 11


@pytest.mark.parametrize(
    "extra",
    [
        {"codec_chunk_frames": 0},
        {"codec_chunk_frames": "many"},
        {"codec_left_context_frames": -1},
        {"codec_chunk_frames": 4, "initial_codec_chunk_frames": 5},
    ],
)
def test_a_wrong_schedule_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"codec_chunk_frames|codec_left_context_frames"):
        cross(talker2code2wav, frames(1), extra=extra)


def test_rotary_positions_of_turns() -> None:
    """A picture of 1 x 2 x 2 in the second turn: it starts one after the first turn, and text after its largest."""
    thinker = torch.tensor(
        [[i, i, i] for i in range(8)]
        + [[8, 8, 8], [8, 8, 9], [8, 9, 8], [8, 9, 9]]
        + [[i, i, i] for i in range(10, 14)]
    )
    rows = torch.tensor([0, 1, 2, *range(6, 14)])  # rows 3 to 5 are the assistant's
    got = talker_positions(thinker, rows, 14).T.tolist()
    first = [[i, i, i] for i in range(3)]
    second = [[3, 3, 3], [4, 4, 4], [5, 5, 5], [5, 5, 6], [5, 6, 5], [5, 6, 6], [7, 7, 7], [8, 8, 8]]
    assert got == [*first, *second, [9, 9, 9], [10, 10, 10], [11, 11, 11]]
    assert talker_positions(thinker, rows[:0], 3).T.tolist() == first
