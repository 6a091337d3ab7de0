"""Servers that tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.entrypoints.openai.server import Server, picture_stages


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Draws without a model; needs a key."""
    path = picture_stages(tmp_path_factory.mktemp("pictures"))
    server = Server(
        *("--stage-configs-path", path, "--served-model-name", "painter,old-painter", "--omni", "--model", "none"),
        *("--max-queue", "8", "--max-body-bytes", "100000", "--max-generated-image-size", "65536"),
        *("--body-timeout", "2", "--allowed-origins", "http://page.example"),
        api_key="sk-secret-of-the-test",
    )
    yield server
    status = server.stop()
    assert status == 0, server.log
    assert "sk-secret" not in server.log
    assert "Traceback" not in server.log, server.log
