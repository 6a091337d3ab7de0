"""``/v1/images/edits`` and ``/v1/videos``, with a pipeline and a stage that are not the package's; and without."""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.entrypoints.openai.server import Server, error_of
from tests.entrypoints.openai.test_guide import Block, blocks, run_block

EDITS, VIDEOS = "/v1/images/edits", "/v1/videos"


def png(colour: tuple[int, int, int] = (10, 100, 200), size: tuple[int, int] = (48, 32)) -> bytes:
    """A picture file of one colour."""
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def opened(data: str) -> Image.Image:
    """A picture of an answer."""
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def paths(server: Server) -> set[str]:
    """The endpoints of the OpenAPI document."""
    return set(server.http.get("/openapi.json").json()["paths"])


# ---------------------------------------------------------------- pictures


def test_edit_by_the_client(editor: Server) -> None:
    answer = editor.openai.images.edit(model="editor", image=("a.png", png()), prompt="a negative", n=2)
    assert answer.data is not None
    for item in answer.data:
        assert item.b64_json is not None
        image = opened(item.b64_json)
        assert (image.size, image.getpixel((0, 0))) == ((48, 32), (245, 155, 55))
    assert len(answer.data) == 2


def test_edit_of_several_pictures(editor: Server) -> None:
    files: Any = [("a.png", png((0, 0, 0))), ("b.png", png((100, 100, 100)))]
    answer = editor.openai.images.edit(model="editor", image=files, prompt="both", output_format="webp")
    assert answer.data is not None
    image = opened(answer.data[0].b64_json or "")
    assert image.format == "WEBP"
    assert image.getpixel((0, 0)) == pytest.approx((205, 205, 205), abs=3)


def test_edit_is_streamed(editor: Server) -> None:
    stream = editor.openai.images.edit(model="editor", image=("a.png", png()), prompt="a negative", stream=True)
    last = list(stream)[-1]
    assert last.type == "image_edit.completed"
    assert opened(last.b64_json).getpixel((0, 0)) == (245, 155, 55)


def test_edit_without_words(editor: Server) -> None:
    answer = editor.http.post(EDITS, data={"prompt": ""}, files={"image": ("a.png", png())})
    assert answer.status_code == 200, answer.text
    assert opened(answer.json()["data"][0]["b64_json"]).getpixel((0, 0)) == (245, 155, 55)


@pytest.mark.parametrize(
    ("fields", "files", "param", "status"),
    [
        ({"prompt": "x"}, {}, "image", 400),
        ({}, {"image": png()}, "prompt", 400),
        ({"prompt": "x", "n": "11"}, {"image": png()}, "n", 400),
        ({"prompt": "x", "n": "many"}, {"image": png()}, "n", 400),
        ({"prompt": "x", "strength": "1"}, {"image": png()}, "strength", 400),
        ({"prompt": "x", "model": "other"}, {"image": png()}, "model", 404),
        ({"prompt": "x", "image": "text"}, {"image": png()}, "image", 400),
        ({"prompt": "x"}, {"image": b"no picture"}, "image", 400),
        ({"prompt": "x"}, {"image": png()[:60]}, "image", 400),
        ({"prompt": "x"}, {"image": png(size=(200, 200))}, "image", 413),
        ({"prompt": "x"}, {"image": png(), "mask": png()}, "mask", 400),
        ({"prompt": "x"}, {"image": png(), "other": png()}, "other", 400),
        ({"prompt": "x", "url": "file:///etc/passwd"}, {}, "url", 400),
        ({"prompt": "x", "size": "9"}, {"image": png()}, "size", 400),
        ({"prompt": "x", "output_compression": "10"}, {"image": png()}, "output_compression", 400),
    ],
)
def test_wrong_edits(editor: Server, fields: dict[str, str], files: Any, param: str, status: int) -> None:
    named = {name: (f"{name}.png", data) for name, data in files.items()}
    texts = {name: (None, text) for name, text in fields.items()}
    answer = editor.http.post(EDITS, files=[*texts.items(), *named.items()])  # type: ignore[list-item]
    assert answer.status_code == status, answer.text
    assert error_of(answer)["param"] == param, answer.text


def chat_with(*parts: Any) -> dict[str, Any]:
    """A chat whose last turn has these parts: text, bytes of a picture, or what is sent as it is."""
    made = []
    for part in parts:
        if isinstance(part, bytes):
            part = {
                "type": "image_url",
                "image_url": {"url": f"data:image/png;base64,{base64.b64encode(part).decode()}"},
            }
        made.append({"type": "text", "text": part} if isinstance(part, str) else part)
    return {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": made}]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("words", [("a negative",), ()])
def test_a_chat_changes_a_picture(editor: Server, words: tuple[str, ...], stream: bool) -> None:
    """The pictures of the last turn go along with its words, which may be missing."""
    body = chat_with(*words, png((0, 0, 0)), png((100, 100, 100)))
    if stream:
        with editor.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
            chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        (content,) = [c["choices"][0]["delta"]["content"] for c in chunks if "content" in c["choices"][0]["delta"]]
    else:
        content = editor.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    (part,) = content
    image = opened(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert (image.size, image.getpixel((0, 0))) == ((48, 32), (205, 205, 205))


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([b"no picture"], "messages.1.content.0.image_url"),
        (["x", png()[:60]], "messages.1.content.1.image_url"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "messages.1.content.0.image_url"),
        ([{"type": "image_url"}], "messages.1.content.0.image_url"),
        ([png(), {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AAAA"}}], "messages"),
        ([png((1, 1, 1), (1, 1))] * 17, "messages"),
        ([], "messages"),
    ],
)
def test_wrong_pictures_in_a_chat(editor: Server, parts: list[Any], param: str) -> None:
    answer = editor.post("/v1/chat/completions", chat_with(*parts))
    assert (answer.status_code, error_of(answer)["param"]) == (400, param), answer.text


def test_edits_need_a_form(editor: Server) -> None:
    assert editor.post(EDITS, {"prompt": "x"}).status_code == 400
    head = {"content-type": "multipart/form-data; boundary=b"}
    assert editor.http.post(EDITS, content=b"--b\r\nbroken", headers=head).status_code == 400
    assert {EDITS, "/v1/images/generations"} <= paths(editor)
    assert not any(path.startswith(VIDEOS) for path in paths(editor))


def test_models_that_can_not(pictures: Server) -> None:
    """A model that draws from text alone says so, and its document does not list what it cannot do."""
    answer = pictures.http.post(EDITS, data={"prompt": "x"}, files={"image": ("a.png", png())})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "not_supported")
    assert "does not edit pictures" in error_of(answer)["message"]
    for method, path in (("POST", VIDEOS), ("POST", VIDEOS + "/sync"), ("GET", VIDEOS), ("GET", VIDEOS + "/x")):
        answer = pictures.http.request(method, path, json={"prompt": "x"} if method == "POST" else None)
        assert (answer.status_code, error_of(answer)["code"]) == (400, "not_supported"), path
    assert not any(path.startswith(VIDEOS) or path == EDITS for path in paths(pictures))


# ---------------------------------------------------------------- videos


def frames(data: bytes) -> tuple[list[Any], int]:
    """Frames and rate of an mp4."""
    import av

    with av.open(io.BytesIO(data)) as container:
        rate = container.streams.video[0].average_rate
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], int(rate or 0)


def ended(server: Server, name: str) -> dict[str, Any]:
    """A job that is not being made any more."""
    begun = time.monotonic()
    while (job := server.http.get(f"{VIDEOS}/{name}").json())["status"] in ("queued", "in_progress"):
        assert time.monotonic() - begun < 30, job
    return dict(job)


def test_a_video_by_the_client(films: Server) -> None:
    """Create, look, fetch, list, delete: the client's own calls."""
    job = films.openai.videos.create_and_poll(model="films", prompt="a film", extra_body={"seed": 40, "fps": 10})
    assert (job.status, job.progress, job.error) == ("completed", 100, None)
    assert job.id.startswith("video_gen_")
    assert (job.model_dump()["num_frames"], job.model_dump()["fps"], job.size) == (5, 10, "48x32")
    made, rate = frames(films.openai.videos.download_content(job.id).read())
    assert (len(made), rate, made[0].shape) == (5, 10, (32, 48, 3))
    assert abs(int(made[0].mean()) - 40) < 6
    assert job.id in [item.id for item in films.openai.videos.list(limit=5)]
    assert films.openai.videos.delete(job.id).deleted
    with pytest.raises(openai.NotFoundError):
        films.openai.videos.retrieve(job.id)


def test_a_video_from_a_picture(films: Server) -> None:
    job = films.openai.videos.create(
        model="films",
        prompt="float",
        input_reference=("a.png", png((5, 5, 5))),
        size="64x48",
        seconds="1",  # type: ignore[arg-type]
    )
    assert ended(films, job.id)["num_frames"] == 24
    made, _ = frames(films.http.get(f"{VIDEOS}/{job.id}/content").content)
    assert (len(made), made[0].shape) == (24, (48, 64, 3))
    assert abs(int(made[0].mean()) - 250) < 6


def test_sync(films: Server) -> None:
    answer = films.post(VIDEOS + "/sync", {"prompt": "a film", "seed": 90, "num_frames": 3})
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["x-model"] == "films"
    assert "0" in json.loads(answer.headers["x-stage-durations"])
    assert len(frames(answer.content)[0]) == 3
    assert float(answer.headers["x-inference-time-s"]) >= 0


def test_width_and_height_in_place_of_size(films: Server) -> None:
    job = ended(films, films.post(VIDEOS, {"prompt": "x", "width": 64, "height": 32}).json()["id"])
    assert (job["size"], job["file_name"]) == ("64x32", f"{job['id']}.mp4")
    assert job["inference_time_s"] == pytest.approx(job["stage_durations"]["0"]["run_s"])


def test_a_failed_and_a_cancelled_video(films: Server) -> None:
    name = films.post(VIDEOS, {"prompt": "fail"}).json()["id"]
    job = ended(films, name)
    assert (job["status"], job["error"]["message"]) == ("failed", "no room")
    assert error_of(films.http.get(f"{VIDEOS}/{name}/content"))["code"] == "video_not_ready"
    hanging = films.post(VIDEOS, {"prompt": "hang"}).json()["id"]
    begun = time.monotonic()
    while films.http.get(f"{VIDEOS}/{hanging}").json()["progress"] != 30:
        assert time.monotonic() - begun < 10
    assert films.http.get("/health").json()["open_requests"] == 1
    assert films.http.delete(f"{VIDEOS}/{hanging}").json()["deleted"]
    while films.http.get("/health").json()["open_requests"]:
        assert time.monotonic() - begun < 10


def test_pages_and_places(films: Server) -> None:
    names = [films.post(VIDEOS, {"prompt": "hang"}).json()["id"] for _ in range(4)]
    full = films.post(VIDEOS, {"prompt": "one more"})
    assert (full.status_code, error_of(full)["code"]) == (429, "queue_full")
    page = films.http.get(VIDEOS, params={"limit": 2}).json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == ([names[3], names[2]], True)
    rest = films.http.get(VIDEOS, params={"after": page["last_id"], "limit": 2}).json()
    assert rest["first_id"] == names[1]
    for name in names:
        films.http.delete(f"{VIDEOS}/{name}")


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ({}, "prompt", 400),
        ({"prompt": "x", "seconds": 0}, "seconds", 400),
        ({"prompt": "x", "seconds": 2, "num_frames": 3}, "seconds", 400),
        ({"prompt": "x", "size": "99999x99999"}, "size", 400),
        ({"prompt": "x", "size": "256x256", "num_frames": 4000}, "num_frames", 400),
        ({"prompt": "x", "lora": "../x"}, "lora", 400),
        ({"prompt": "x", "width": 64}, "size", 400),
        ({"prompt": "x", "size": "64x64", "width": 64, "height": 64}, "size", 400),
        ({"prompt": "x", "model": "other"}, "model", 404),
        ({"prompt": ""}, "prompt", 400),
        ({"prompt": "x", "seconds": "soon"}, "seconds", 400),
        ({"prompt": "x", "num_frames": "3"}, "num_frames", 400),
        ({"prompt": "x", "guidance_scale": True}, "guidance_scale", 400),
    ],
)
def test_wrong_videos(films: Server, body: dict[str, Any], param: str, status: int) -> None:
    for path in (VIDEOS, VIDEOS + "/sync"):
        answer = films.post(path, body)
        assert (answer.status_code, error_of(answer)["param"]) == (status, param), answer.text


def test_a_video_without_words_but_a_picture(films: Server) -> None:
    fields = {"prompt": "", "num_frames": "2"}
    answer = films.http.post(VIDEOS + "/sync", data=fields, files={"input_reference": ("a.png", png((5, 5, 5)))})
    assert answer.status_code == 200, answer.text
    assert abs(int(frames(answer.content)[0][0].mean()) - 250) < 6


def test_seconds_may_be_text_in_json(films: Server) -> None:
    answer = films.post(VIDEOS + "/sync", {"prompt": "x", "seconds": "0.25", "fps": 8})
    assert len(frames(answer.content)[0]) == 2


def test_a_chat_with_a_model_that_makes_videos(films: Server) -> None:
    answer = films.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "not_supported")
    assert error_of(answer)["message"] == "films makes video, not image"


def test_wrong_names(films: Server) -> None:
    assert error_of(films.http.get(VIDEOS, params={"befor": "x"}))["param"] == "befor"
    assert films.http.get(f"{VIDEOS}/..%2F..%2Fetc%2Fpasswd").status_code == 404
    assert films.http.get(f"{VIDEOS}/none/content").status_code == 404
    assert films.http.get(VIDEOS, params={"limit": 0}).status_code == 400
    assert films.http.get(VIDEOS, params={"after": "none"}).status_code == 404
    assert films.http.post(VIDEOS, data={"prompt": "x"}, files={"input_reference": ("a", b"x")}).status_code == 400
    assert {VIDEOS, VIDEOS + "/sync", VIDEOS + "/{video_id}/content"} <= paths(films)


@pytest.mark.parametrize("block", blocks("films"), ids=lambda b: b.language)
def test_reference_of_videos(films: Server, block: Block, tmp_path: Path) -> None:
    run_block(block, films, tmp_path)
    assert len(frames((tmp_path / "waves.mp4").read_bytes())[0]) in (5, 12)


@pytest.mark.parametrize("block", blocks("editor"), ids=lambda b: b.language)
def test_reference_of_edits(editor: Server, block: Block, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png())
    made = run_block(block, editor, tmp_path)
    assert "b64_json" in made or "data:image/png;base64" in made


def test_fuzz_edits(editor: Server, tmp_path: Path) -> None:
    from tests.entrypoints.openai.test_fuzz import fuzz

    fuzz(editor, tmp_path, EDITS)


def test_fuzz(films: Server, tmp_path: Path) -> None:
    from tests.entrypoints.openai.test_fuzz import fuzz

    fuzz(films, tmp_path, VIDEOS + "/sync", VIDEOS + "/{video_id}/content")
