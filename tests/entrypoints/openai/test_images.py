"""``/v1/images/generations`` by OpenAI's client: shapes, bounds, progress, cancelling."""

from __future__ import annotations

import base64
import io
import json
import time
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from tests.entrypoints.openai.server import Server, error_of

PATH = "/v1/images/generations"


def decode(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def state(server: Server) -> dict[str, Any]:
    """Open requests, as the server counts them."""
    return dict(server.http.get("/ready").json())


def test_picture_of_the_openai_client(pictures: Server) -> None:
    before = int(time.time())
    answer = pictures.openai.images.generate(
        model="painter", prompt="two words", n=2, size="48x32", extra_body={"seed": 9, "negative_prompt": "abc"}
    )
    assert before <= answer.created <= time.time()
    assert answer.size == "48x32"  # type: ignore[comparison-overlap]
    assert answer.output_format == "png"
    assert answer.data is not None
    assert len(answer.data) == 2
    for item in answer.data:
        image = decode(item.b64_json)
        assert (image.format, image.size, image.getpixel((0, 0))) == ("PNG", (48, 32), (2, 3, 9))


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_formats(pictures: Server, form: str) -> None:
    answer = pictures.post(
        PATH, {"prompt": "x", "output_format": form, "output_compression": 100 if form == "png" else 80}
    )
    assert answer.status_code == 200
    assert answer.json()["output_format"] == form
    assert decode(answer.json()["data"][0]["b64_json"]).format == form.upper()


def test_fields_that_clients_send_by_default(pictures: Server) -> None:
    more = {"generator_device": "cpu"}
    answer = pictures.openai.images.generate(prompt="x", quality="auto", background="opaque", extra_body=more)
    assert answer.data is not None
    assert answer.data[0].b64_json is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vae_use_tiling": True}, "start it with --vae-use-tiling"),
        ({"lora": {"path": "../../etc"}}, "there are no adapters"),
        ({"style": "vivid"}, "say it in the prompt"),
        ({"width": 64}, 'give size="WIDTHxHEIGHT"'),
        ({"generator_device": "tpu"}, "'cpu' or 'cuda'"),
        ({"quality": "high"}, "'auto'"),
        ({"promt": "x"}, "unknown parameter"),
    ],
)
def test_what_to_do_instead(pictures: Server, change: dict[str, Any], said: str) -> None:
    """A field of other servers that is not there says what to do in its place."""
    answer = pictures.post(PATH, {"prompt": "x", **change})
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, next(iter(change)))
    assert said in error["message"]


def test_metrics_of_a_picture(pictures: Server) -> None:
    body = {"prompt": "x", "seed": 4, "num_inference_steps": 7, "return_stage_metrics": True}
    metrics = pictures.post(PATH, body).json()["metrics"]
    assert (metrics["seed"], metrics["num_inference_steps"]) == (4, 7)
    assert metrics["stages"]["0"]["run_s"] >= 0
    assert "metrics" not in pictures.post(PATH, {"prompt": "x"}).json()


def test_progress_is_streamed(pictures: Server) -> None:
    with pictures.openai.images.generate(prompt="steps", model="old-painter", n=2, stream=True) as stream:
        events = [event.model_dump() for event in stream]
    progress = [(e["step"], e["total"]) for e in events if e["type"] == "image_generation.progress"]
    assert progress == [(1, 3), (2, 3), (3, 3)]
    done = [e for e in events if e["type"] == "image_generation.completed"]
    assert [decode(e["b64_json"]).size for e in done] == [(32, 16)] * 2
    assert len(events) == 5


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": 7}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 40_000}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": 10**30}, "n"),
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"size": "1024"}, "size"),
        ({"size": "0x0"}, "size"),
        ({"size": "-16x16"}, "size"),
        ({"size": "99999x99999"}, "size"),
        ({"size": "257x256"}, "size"),
        ({"size": "8x8"}, "size"),
        ({"size": [16, 16]}, "size"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 201}, "num_inference_steps"),
        ({"guidance_scale": 21}, "guidance_scale"),
        ({"guidance_scale": "much"}, "guidance_scale"),
        ({"seed": 2**64}, "seed"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 99}, "output_compression"),
        ({"output_format": "webp", "output_compression": 101}, "output_compression"),
        ({"negative_prompt": ["a"]}, "negative_prompt"),
        ({"lora": {"name": "../../etc/passwd"}}, "lora"),
        ({"sizee": "16x16"}, "sizee"),
    ],
)
def test_wrong_field(pictures: Server, change: dict[str, Any], param: str) -> None:
    answer = pictures.post(PATH, {"prompt": "x", **change})
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert param in error["message"]


def test_wrong_field_by_the_client(pictures: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        pictures.openai.images.generate(prompt="x", n=99)
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError) as missing:
        pictures.openai.images.generate(prompt="x", model="dall-e-3")
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_error_of_the_stage(pictures: Server, stream: bool) -> None:
    answer = pictures.post(PATH, {"prompt": "fail", "stream": stream})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "size")
    answer = pictures.post(PATH, {"prompt": "oom", "stream": stream})
    assert (answer.status_code, error_of(answer)["type"]) == (503, "server_error")
    assert pictures.post(PATH, {"prompt": "x"}).status_code == 200


def until_open(server: Server, count: int) -> None:
    """Wait until so many requests are open."""
    deadline = time.monotonic() + 10
    while (now := server.http.get("/health").json()["open_requests"]) != count:
        assert time.monotonic() < deadline, f"{now} are open, not {count}"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_request(pictures: Server, stream: bool) -> None:
    body = json.dumps({"prompt": "hang", "stream": stream})
    headers = {"authorization": f"Bearer {pictures.api_key}", "content-type": "application/json"}
    with httpx.Client(base_url=pictures.url, headers=headers) as leaving:
        if stream:
            with leaving.stream("POST", PATH, content=body, timeout=10) as answer:
                pieces = answer.iter_text()  # httpx leaves when this is collected
                assert '"total":9' in next(pieces)
                until_open(pictures, 1)
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post(PATH, content=body, timeout=0.5)
    until_open(pictures, 0)


def test_more_than_the_queue_holds_is_refused(pictures: Server) -> None:
    import concurrent.futures as futures

    headers = {"authorization": f"Bearer {pictures.api_key}"}
    with httpx.Client(base_url=pictures.url, headers=headers) as client, futures.ThreadPoolExecutor(8) as pool:

        def hang() -> None:
            with pytest.raises(httpx.ReadTimeout):
                client.post(PATH, json={"prompt": "hang"}, timeout=httpx.Timeout(10, read=2))

        waiting = [pool.submit(hang) for _ in range(8)]
        until_open(pictures, 8)
        answer = pictures.post(PATH, {"prompt": "x"})
        assert answer.status_code == 429
        assert error_of(answer)["type"] == "rate_limit_error"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert pictures.http.get("/ready").status_code == 503
        for future in waiting:
            future.result()
    until_open(pictures, 0)
    assert pictures.post(PATH, {"prompt": "x"}).status_code == 200
    assert pictures.http.get("/ready").status_code == 200
