"""Several answers with sound or pictures to one chat, and what their tokens come to."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.entrypoints.openai.server import Server, error_of
from tests.entrypoints.openai.test_chat import ASK, PATH, SPEAK, samples
from vllm_omni.entrypoints.openai.choices import all_of, side_by_side, total_usage

IMAGES = "/v1/images/generations"
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 5, **SPEAK}


def spoken(server: Server, **more: Any) -> Any:
    return server.openai.chat.completions.create(
        messages=ASK, audio={"voice": "Ethan", "format": "wav"}, **{**SAMPLED, **more}
    )


def test_speeches(omni_server: Server) -> None:
    """Each is what a request of its own with the seed plus its number gives."""
    answer = spoken(omni_server, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.audio.transcript for choice in answer.choices]
    assert len(set(texts)) == 3
    alone = [spoken(omni_server, seed=5 + number) for number in range(3)]
    for choice, one in zip(answer.choices, alone, strict=True):
        mine, other = choice.message.audio, one.choices[0].message.audio
        assert (mine.transcript, choice.finish_reason) == (other.transcript, one.choices[0].finish_reason)
        first, second = samples(mine.data), samples(other.data)
        assert len(first) == len(second)
        assert np.abs(first - second.astype(int)).max() < 100
    assert len({choice.message.audio.id for choice in answer.choices}) == 3
    assert answer.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert answer.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_speeches(omni_server: Server) -> None:
    whole = spoken(omni_server, n=2)
    chunks = list(
        omni_server.openai.chat.completions.create(
            messages=ASK,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
            audio={"voice": "Ethan", "format": "pcm16"},
            extra_body={"return_stage_metrics": True},
            **SAMPLED,
        )
    )
    text, sound, ends = ["", ""], [b"", b""], [[], []]  # type: ignore[var-annotated]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        audio = choice.delta.model_dump().get("audio") or {}
        text[choice.index] += audio.get("transcript") or ""
        sound[choice.index] += base64.b64decode(audio.get("data") or "")
        ends[choice.index] += [(choice.finish_reason, "metrics" in chunk.model_dump())] if choice.finish_reason else []
    assert text == [choice.message.audio.transcript for choice in whole.choices]
    for data, choice in zip(sound, whole.choices, strict=True):
        assert np.abs(np.frombuffer(data, "<i2") - samples(choice.message.audio.data).astype(int)).max() < 100
    assert ends == [[(choice.finish_reason, True)] for choice in whole.choices]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"n": 11, **SPEAK}, "n", "10 at most"),
        ({"n": 65}, "n", "64"),
        ({"n": 0, **SPEAK}, "n", "1"),
        ({"best_of": 2}, "best_of", "n gives several"),
        ({"use_beam_search": True}, "use_beam_search", "not supported"),
        ({"length_penalty": 1.0}, "length_penalty", "beam search"),
    ],
)
def test_what_is_refused(omni_server: Server, change: dict[str, Any], param: str, words: str) -> None:
    answer = omni_server.post(PATH, {"messages": ASK, **change})
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert words in error_of(answer)["message"]


def picture(part: dict[str, Any]) -> Image.Image:
    data = part["image_url"]["url"].removeprefix("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_pictures(pictures: Server) -> None:
    """A choice for each, the seed grows; a stage that tells no tokens has no usage."""
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "steps two"}], "n": 3, "seed": 5, "size": "32x16"}
    answer = pictures.post(PATH, {**ask, "num_outputs_per_prompt": 2}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for number, choice in enumerate(answer["choices"]):
        assert [picture(part).getpixel((0, 0)) for part in choice["message"]["content"]] == [(2, 0, 5 + number)] * 2
    assert answer["usage"] is None
    got: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for chunk in pictures.openai.chat.completions.create(
        model="painter", messages=ask["messages"], n=3, seed=5, stream=True
    ):
        (choice,) = chunk.choices
        delta = choice.delta.model_dump(exclude_none=True)
        if "role" in delta:
            got[choice.index].append(delta["role"])
        if "progress" in chunk.model_dump():
            got[choice.index].append(chunk.model_dump()["progress"]["step"])
        if "content" in delta:
            got[choice.index].append(picture(delta["content"][0]).getpixel((0, 0)))
        if choice.finish_reason:
            got[choice.index].append(choice.finish_reason)
    assert got == {number: ["assistant", 1, 2, 3, (2, 0, 5 + number), "stop"] for number in range(3)}
    answer = pictures.post(PATH, {**ask, "n": 9})  # the queue has eight places
    assert (answer.status_code, error_of(answer)["param"]) == (400, "n")
    failed = pictures.post(PATH, {**ask, "messages": [{"role": "user", "content": "fail"}]})
    assert (failed.status_code, error_of(failed)["param"]) == (400, "size")
    assert pictures.http.get("/health").json()["open_requests"] == 0


def test_tokens_of_pictures(tiny: Server) -> None:
    """Counted by the model's own tokenizer; and the picture's latent tokens."""
    from transformers import AutoTokenizer

    words = tiny.process.args
    assert isinstance(words, list)
    tokenizer = AutoTokenizer.from_pretrained(Path(words[words.index("--model") + 1]) / "tokenizer")
    prompts = [" ".join(["a lighthouse"] * count) for count in (1, 3, 40)]
    counts = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    assert 1 < counts[0] < counts[1] < counts[2]
    usages: dict[str, Any] = {}

    def draw(prompt: str) -> None:
        with httpx.Client(base_url=tiny.url, timeout=60) as client:
            body = {"prompt": prompt, "size": "64x64", "num_inference_steps": 3, "n": 2}
            usages[prompt] = client.post(IMAGES, json=body).json()["usage"]

    threads = [threading.Thread(target=draw, args=(prompt,)) for prompt in prompts]  # decoded together, or not
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for prompt, count in zip(prompts, counts, strict=True):
        details = {"text_tokens": count, "image_tokens": 0}
        made = usages[prompt]["output_tokens"]
        assert usages[prompt] == {
            **{"input_tokens": count, "output_tokens": made, "total_tokens": count + made},
            "input_tokens_details": details,
        }
        assert made == usages[prompts[0]]["output_tokens"] > 0
    made = usages[prompts[0]]["output_tokens"] // 2
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": prompts[1]}], "size": "64x64", "seed": 3}
    ask |= {"num_inference_steps": 2, "n": 2}
    answer = tiny.post(PATH, ask).json()
    assert answer["usage"] == {
        "prompt_tokens": counts[1],
        "completion_tokens": 2 * made,
        "total_tokens": counts[1] + 2 * made,
    }
    alone = tiny.post(PATH, {**ask, "n": 1, "seed": 4}).json()
    second, other = (
        np.asarray(picture(one["message"]["content"][0]), int) for one in (answer["choices"][1], alone["choices"][0])
    )
    assert np.abs(second - other).max() <= 1
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    assert f'"prompt_tokens":{counts[1]}' in tiny.post(PATH, {**ask, **stream}).text
    events = list(tiny.openai.images.generate(prompt=prompts[0], stream=True, n=2, extra_body={"size": "64x64"}))  # type: ignore[call-overload]
    told = [event.usage for event in events if event.type == "image_generation.completed"]
    assert told[0] is None
    assert (told[1].input_tokens, told[1].output_tokens) == (counts[0], 2 * made)


# ---------------------------------------------------------------- the parts


async def numbers(until: int, closed: list[int], fail: bool = False) -> AsyncGenerator[int, None]:
    try:
        for number in range(until):
            await asyncio.sleep(0)
            yield number
        if fail:
            raise ValueError("mine")
        await asyncio.sleep(0 if until < 9 else 60)
    finally:
        closed.append(until)


async def test_side_by_side() -> None:
    closed: list[int] = []
    got = [item async for item in side_by_side([numbers(2, closed), numbers(3, closed)])]
    assert sorted(got) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    closed.clear()
    with pytest.raises(ValueError, match="mine"):
        [item async for item in side_by_side([numbers(2, closed, fail=True), numbers(9, closed)])]
    assert sorted(closed) == [2, 9]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_all_of() -> None:
    ended = []

    async def work(number: int) -> int:
        try:
            await asyncio.sleep(0 if number < 9 else 60)
            if number == 3:
                raise ValueError("mine")
            return number
        finally:
            ended.append(number)

    assert await all_of([work(1), work(2)]) == [1, 2]
    with pytest.raises(ValueError, match="mine"):
        await all_of([work(9), work(3)])
    assert sorted(ended) == [1, 2, 3, 9]
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_total_usage() -> None:
    one = {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 1}}
    details = {"completion_tokens_details": {"reasoning_tokens": 2}}
    assert total_usage([one, None]) is None
    assert total_usage([{**one, **details}, {**one, **details}]) == {
        **{**one, "completion_tokens": 6, "total_tokens": 10},
        "completion_tokens_details": {"reasoning_tokens": 4},
    }
