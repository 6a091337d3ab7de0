"""``/metrics``, profiles, and a real picture: a tiny diffusion model behind the server."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.entrypoints.openai.server import Server, error_of

PATH = "/v1/images/generations"
PAGE = Path(__file__).parents[3] / "docs" / "user_guide" / "metrics.md"


def read(server: Server) -> dict[str, float]:
    """Every sample, by name and labels."""
    text = server.http.get("/metrics").text
    return {
        sample.name + json.dumps(sample.labels, sort_keys=True): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny random FLUX."""
    from vllm_omni.diffusion.tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("flux")
    make_tiny_model("flux", folder / "model", seed=0)
    profiles = {"VLLM_TORCH_PROFILER_DIR": str(folder / "profiles")}
    server = Server(
        str(folder / "model"), "--served-model-name", "flux", "--distributed-executor-backend", "mp", **profiles
    )
    yield server
    assert server.stop() == 0, server.log


def test_picture_and_its_measurements(flux: Server) -> None:
    """The same seed gives the same picture, and what was done is counted."""
    before = read(flux)
    ask = {"prompt": "a lighthouse", "size": "64x64", "num_inference_steps": 3, "seed": 7}
    pictures = []
    for body in (ask, ask, {**ask, "seed": 8}):
        answer = flux.openai.images.generate(model="flux", prompt="", extra_body=body)
        assert answer.data is not None
        data = base64.b64decode(answer.data[0].b64_json or "")
        pictures.append(np.asarray(Image.open(io.BytesIO(data))))
        assert pictures[-1].shape == (64, 64, 3)
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    grown = {name: value - before.get(name, 0) for name, value in read(flux).items()}
    assert grown["vllm_omni_images_total{}"] == 3
    assert grown['vllm_omni_requests_total{"outcome": "ok"}'] == 3
    assert grown['vllm_omni_step_seconds_count{"stage": "0"}'] == 6
    assert grown["vllm_omni_image_request_seconds_count{}"] == 3
    assert grown['vllm_omni_stage_seconds_count{"phase": "run", "stage": "0"}'] == 3
    whole, run = grown["vllm_omni_request_seconds_sum{}"], 'vllm_omni_stage_seconds_sum{"phase": "run", "stage": "0"}'
    assert 0 < grown[run] <= whole
    key = f'vllm_omni_http_requests_total{{"endpoint": "{PATH}", "status": "200"}}'
    assert grown[key] == 3


def test_steps_are_streamed(flux: Server) -> None:
    body = {"prompt": "x", "size": "64x64", "num_inference_steps": 4, "stream": True}
    with flux.http.stream("POST", PATH, json=body) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert [(event.get("step"), event.get("total")) for event in events[:-1]] == [(i, 4) for i in (1, 2, 3, 4)]
    assert events[-1]["type"] == "image_generation.completed"


def test_previews(flux: Server) -> None:
    """As OpenAI's client reads them: numbered, in between the steps, as large as the picture."""
    more = {"num_inference_steps": 4, "output_format": "jpeg", "n": 2}
    events = list(
        flux.openai.images.generate(
            prompt="x",
            size="64x64",
            stream=True,
            partial_images=2,
            extra_body=more,  # type: ignore[call-overload]
        )
    )
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    both = ["partial_image", "partial_image"]
    assert kinds == ["progress", *both, "progress", "progress", *both, "progress", "completed", "completed"]
    shown = [event for event in events if event.type == "image_generation.partial_image"]
    assert [(event.partial_image_index, event.image_index) for event in shown] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for event in (*shown, *events[-2:]):
        image = Image.open(io.BytesIO(base64.b64decode(event.b64_json)))
        assert (image.size, image.format, event.size) == ((64, 64), "JPEG", "64x64")
        assert event.model_dump(include={"output_format", "background", "quality"}) == {
            "output_format": "jpeg",
            "background": "opaque",
            "quality": "auto",
        }
    answer = flux.post(PATH, {"prompt": "x", "partial_images": 1})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "partial_images")


def test_what_the_model_does_not_take(flux: Server) -> None:
    answer = flux.post(PATH, {"prompt": "x", "size": "60x64"})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "size")


def test_transfers(flux: Server) -> None:
    """Bytes and times to the stage and back, of one picture of a known size."""
    before = read(flux)
    answer = flux.post(PATH, {"prompt": "x", "size": "64x64", "num_inference_steps": 1, "return_stage_metrics": True})
    times = answer.json()["metrics"]["stages"]["0"]
    grown = {name: value - before.get(name, 0) for name, value in read(flux).items()}
    labels = {way: f'{{"direction": "{way}", "stage": "0"}}' for way in ("in", "out")}
    picture = 64 * 64 * 3
    assert picture <= grown["vllm_omni_transfer_bytes_total" + labels["out"]] < picture + 2000
    assert 10 < grown["vllm_omni_transfer_bytes_total" + labels["in"]] < 1000
    for way in ("in", "out"):
        assert grown["vllm_omni_transfer_bytes_total" + labels[way]] == times[f"bytes_{way}"]
        assert grown["vllm_omni_transfer_seconds_count" + labels[way]] == 1
        assert grown["vllm_omni_transfer_seconds_sum" + labels[way]] == pytest.approx(times[f"transfer_{way}_s"])
    both = times["transfer_in_s"] + times["transfer_out_s"]
    assert times["transfer_s"] == pytest.approx(both)


def test_profile(flux: Server) -> None:
    assert flux.post("/stop_profile", None).status_code == 400
    assert flux.post("/start_profile", None).json() == {"status": "started"}
    assert flux.post("/start_profile", None).status_code == 400
    flux.post(PATH, {"prompt": "x", "size": "64x64", "num_inference_steps": 1})
    files = flux.post("/stop_profile", None).json()["files"]
    assert list(files) == ["0"]
    assert files["0"]
    for name in files["0"]:
        assert Path(name).stat().st_size > 0


def test_kill_of_a_rank(flux: Server) -> None:
    """The last test of this server: the rank's death is seen while nothing runs."""
    victims = [child for child in flux.children() if "rank" in child.name()]
    assert len(victims) == 1, flux.children()
    victims[0].kill()
    begun = time.monotonic()
    while (answer := flux.http.get("/health")).status_code == 200:
        assert time.monotonic() - begun < 1.0
    assert answer.status_code == 503
    assert "rank" in error_of(answer)["message"]
    assert flux.http.get("/ready").status_code == 503
    assert flux.post(PATH, {"prompt": "x", "size": "64x64"}).status_code == 503


def test_refusals_and_errors_are_counted(pictures: Server) -> None:
    before = read(pictures)
    pictures.post(PATH, {"prompt": "fail"})
    pictures.post(PATH, {"prompt": "x", "n": 99})
    pictures.http.get("/nothing/of/the/kind")
    grown = {name: value - before.get(name, 0) for name, value in read(pictures).items()}
    assert grown['vllm_omni_requests_total{"outcome": "RequestError"}'] == 1
    assert grown[f'vllm_omni_http_requests_total{{"endpoint": "{PATH}", "status": "400"}}'] == 2
    assert grown['vllm_omni_http_requests_total{"endpoint": "other", "status": "404"}'] == 1
    assert read(pictures)["vllm_omni_requests_open{}"] == 0


def test_requests_at_work_are_counted(pictures: Server) -> None:
    """While a request is in the stage, and no more when its client has left."""
    gauges = ("requests_open{}", *(f'stage_{name}{{"stage": "0"}}' for name in ("requests", "running", "queued")))

    def now() -> list[float]:
        values = read(pictures)
        return [values["vllm_omni_" + name] for name in gauges]

    with pictures.http.stream("POST", PATH, json={"prompt": "hang", "stream": True}) as answer:
        lines = answer.iter_lines()
        assert "progress" in next(lines)
        assert now() == [1, 1, 1, 0]
    begun = time.monotonic()
    while now() != [0, 0, 0, 0]:
        assert time.monotonic() - begun < 10


def test_every_measurement_is_documented(pictures: Server) -> None:
    families = text_string_to_metric_families(pictures.http.get("/metrics").text)
    names = {family.name for family in families if not family.name.endswith("_created")}
    assert len(names) >= 15
    text = PAGE.read_text()
    assert sorted(name for name in names if f"`{name}`" not in text) == []


def test_measurements_of_speech(omni_server: Server) -> None:
    before = read(omni_server)
    turn = {"messages": [{"role": "user", "content": "hello"}], "modalities": ["text", "audio"]}
    assert omni_server.post("/v1/chat/completions", turn).status_code == 200
    grown = {name: value - before.get(name, 0) for name, value in read(omni_server).items()}
    assert grown["vllm_omni_audio_seconds_total{}"] == pytest.approx((12 * 1920 - 555) / 24000)
    for name in ("time_to_first_text_seconds", "time_to_first_audio_seconds", "real_time_factor"):
        assert grown[f"vllm_omni_{name}_count{{}}"] == 1
    assert grown['vllm_omni_tokens_total{"kind": "generated"}'] == 8
    for stage in range(3):
        for phase in ("wait", "transfer", "queue", "run"):
            assert grown[f'vllm_omni_stage_seconds_count{{"phase": "{phase}", "stage": "{stage}"}}'] == 1
        assert grown[f'vllm_omni_transfer_seconds_count{{"direction": "in", "stage": "{stage}"}}'] == 1
    sent = [grown[f'vllm_omni_transfer_bytes_total{{"direction": "out", "stage": "{stage}"}}'] for stage in range(3)]
    assert sent[0] > 0
    assert sent[2] >= 4 * (12 * 1920 - 555)
