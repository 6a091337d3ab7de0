"""Servers that tests of a module share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from tests.entrypoints.graphs import stage, write
from tests.entrypoints.openai.browser import chromium
from tests.entrypoints.openai.server import Server, picture_stages

PIPELINE = "tests.entrypoints.openai.edit_pipeline.InvertPipeline"
VIDEOS = "tests.entrypoints.openai.video_stage.VideoStage"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Draws without a model; needs a key."""
    path = picture_stages(tmp_path_factory.mktemp("pictures"))
    server = Server(
        *("--stage-configs-path", path, "--served-model-name", "painter,old-painter,flux", "--omni", "--model", "none"),
        *("--max-queue", "8", "--max-body-bytes", "100000", "--max-generated-image-size", "65536"),
        *("--body-timeout", "2", "--allowed-origins", "http://page.example", "--access-log"),
        api_key="sk-secret-of-the-test",
    )
    yield server
    status = server.stop()
    assert status == 0, server.log
    assert "sk-secret" not in server.log
    assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="session")
def omni_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-Omni."""
    from vllm_omni.model_executor.tiny_models.qwen3_omni import make_tiny_qwen3_omni

    return make_tiny_qwen3_omni(tmp_path_factory.mktemp("qwen3_omni"), seed=2)


@pytest.fixture(scope="package")
def omni_server(omni_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Speaks: three engines of vLLM's on the tiny checkpoint, greedy and short."""
    from tests.model_executor.qwen3_omni.test_end2end import short_stages

    folder = tmp_path_factory.mktemp("omni_server")
    stages = short_stages(omni_checkpoint, folder)
    media = folder / "media"
    media.mkdir()
    server = Server(
        *(str(omni_checkpoint), "--stage-configs-path", str(stages), "--served-model-name", "omni"),
        *("--allowed-local-media-path", str(media), "--allowed-media-domains", "localhost"),
        *("--max-audio-seconds", "60", "--max-media-pixels", "1000000", "--max-media-bytes", "1000000"),
        "--trust-request-mm-kwargs",
    )
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Draws: a tiny model, without a key."""
    from vllm_omni.diffusion.tiny_models import make_tiny_model

    folder = make_tiny_model("qwen-image", tmp_path_factory.mktemp("tiny"))
    server = Server("--model", str(folder), "--served-model-name", "tiny")
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="package")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Makes negatives of pictures: a pipeline that is not the package's."""
    from vllm_omni.diffusion.tiny_models import make_tiny_model

    folder = make_tiny_model("qwen-image", tmp_path_factory.mktemp("tiny"))
    server = Server(
        *("--model", str(folder), "--served-model-name", "editor", "--diffusion-load-format", "dummy"),
        *("--custom-pipeline-args", json.dumps({"pipeline_class": PIPELINE}), "--max-media-pixels", "10000"),
    )
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="package")
def films(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Makes videos, without a model."""
    path = write(tmp_path_factory.mktemp("films"), [stage(0, final="video", engine={"engine_cls": VIDEOS})])
    words = ["--stage-configs-path", path, "--served-model-name", "films", "--model", "none", "--max-queue", "4"]
    words += ["--max-generated-image-size", "65536"]
    server = Server(*words, TMPDIR=str(tmp_path_factory.mktemp("tmp")))
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log, server.log
    assert not list(tmp_path_factory.getbasetemp().glob("tmp*/vllm-omni-videos-*"))


@pytest.fixture(scope="package")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the browser puts what it saves."""
    return tmp_path_factory.mktemp("browser") / "downloads"


@pytest.fixture(scope="package")
def chrome(downloads: Path) -> Iterator[Chrome]:
    """The browser of all tests of the page."""
    with chromium(downloads.parent) as driver:
        yield driver
