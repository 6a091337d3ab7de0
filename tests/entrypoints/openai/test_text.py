"""A plain language model behind the server; its engine is killed in the end."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import yaml

from tests.ar_models import save_lm
from tests.ar_support import SMALL
from tests.entrypoints.openai.server import Server, error_of

PATH = "/v1/chat/completions"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One engine of vLLM's."""
    folder = tmp_path_factory.mktemp("lm")
    save_lm(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    row = {"stage_id": 0, "stage_type": "ar", "final_output": True, "final_output_type": "text", "engine_args": SMALL}
    row["default_sampling_params"] = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}
    (folder / "stages.yaml").write_text(yaml.safe_dump({"stage_args": [row]}))
    server = Server(str(folder), "--stage-configs-path", str(folder / "stages.yaml"), "--served-model-name", "lm")
    yield server
    assert server.stop() == 0, server.log


def test_chat(lm: Server) -> None:
    answer = lm.openai.chat.completions.create(model="lm", messages=[{"role": "user", "content": "say it again"}])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert answer.choices[0].finish_reason == "length"
    long = lm.openai.chat.completions.create(
        model="lm", messages=[{"role": "user", "content": "say"}], max_completion_tokens=9, seed=1
    )
    assert long.usage is not None
    assert long.usage.completion_tokens == 9


def test_model_that_does_not_speak(lm: Server) -> None:
    body = {"messages": [{"role": "user", "content": "say"}], "modalities": ["text", "audio"]}
    answer = lm.post(PATH, body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "modalities")
    assert lm.http.get("/v1/audio/voices").status_code == 400


def test_kill_of_the_engine(lm: Server) -> None:
    assert lm.http.get("/health").status_code == 200
    victims = [child for child in lm.children() if "EngineCore" in " ".join([child.name(), *child.cmdline()])]
    assert victims, lm.children()
    victims[0].kill()
    begun = time.monotonic()
    while (answer := lm.http.get("/health")).status_code == 200:
        assert time.monotonic() - begun < 1.0
    assert answer.status_code == 503
    error_of(answer)
    assert lm.post(PATH, {"messages": [{"role": "user", "content": "say"}]}).status_code == 503
