"""Answers of other shapes in the playground: ``--compat upstream``, thoughts, a full server; from a stand-in."""

from __future__ import annotations

import base64
import json
import threading
import wave
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome

from tests.entrypoints.openai.page import Talking, run_text
from tests.entrypoints.openai.server import Server

pytestmark = pytest.mark.browser
SOUND = bytes(range(256)) * 40


def events(*deltas: tuple[dict[str, Any], dict[str, Any]]) -> str:
    """A stream of chunks: (delta, what stands beside the choices)."""
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}], **more} for delta, more in deltas]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


UPSTREAM = events(
    ({"role": "assistant", "content": "One "}, {"modality": "text"}),
    ({"content": base64.b64encode(SOUND[:4096]).decode()}, {"modality": "audio"}),
    ({"content": "two."}, {"modality": "text"}),
    ({"content": base64.b64encode(SOUND[4096:]).decode()}, {"modality": "audio"}),
)


@pytest.fixture
def page(chrome: Chrome, tiny: Server) -> Iterator[Talking]:
    opened = Talking(chrome, tiny.url, "chat")
    yield opened
    opened.forget()
    assert chrome.get_log("browser") == []


def answer_with(page: Talking, body: str, status: int = 200, **headers: str) -> None:
    """The page's next requests get this answer."""
    script = "const [body, options] = arguments; window.fetch = async () => new Response(body, options);"
    page.run(script, body, {"status": status, "headers": headers})


def test_upstream_shape(page: Talking) -> None:
    answer_with(page, UPSTREAM)
    page.ask("count")
    assert page.answers() == ["One two."]
    length = page.later(
        """const done = arguments[0];
        import("/playground/store.js").then((store) => store.all("turns")).then(([turn]) => done(turn.sound.length))"""
    )
    assert length == len(SOUND) // 2


class StandIn(BaseHTTPRequestHandler):
    """Answers every request in upstream's shape."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(UPSTREAM.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def stand_in() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("language", ["curl", "python"])
def test_code_for_upstream_shape(page: Talking, stand_in: str, language: str, tmp_path: Path) -> None:
    body = {"model": "omni", "messages": [], "modalities": ["audio"], "audio": {"format": "pcm16"}, "stream": True}
    text = page.later(
        """const [origin, body, language, done] = arguments;
        import("/playground/snippets.js").then(({chats}) =>
          done(chats(origin, body, false, {compat: "upstream"})[language]()))""",
        stand_in,
        body,
        language,
    )
    assert run_text(text, tmp_path, language).strip() == "One two."
    with wave.open(str(tmp_path / "answer.wav")) as file:
        assert file.readframes(file.getnframes()) == SOUND


def test_thoughts_are_folded_away(page: Talking) -> None:
    answer_with(page, events(({"reasoning": "Hm, "}, {}), ({"reasoning": "well."}, {}), ({"content": "Yes."}, {})))
    page.ask("is it")
    (thoughts,) = page.all("#turns details.thoughts")
    assert not thoughts.find_element("tag name", "p").is_displayed()
    thoughts.find_element("tag name", "summary").click()
    assert thoughts.text == "Thoughts\nHm, well."
    assert page.answers() == ["Yes."]
    page.driver.refresh()
    page.until(lambda: page.answers() == ["Yes."])
    assert len(page.all("#turns details.thoughts")) == 1


def test_a_full_server_and_an_error_in_the_stream(page: Talking) -> None:
    error = {"message": "2 requests are open, as many as may be; try again later", "param": None}
    answer_with(page, json.dumps({"error": error}), 429, **{"retry-after": "7"})
    page.ask("now?")
    said = "The server is busy: 2 requests are open, as many as may be. Try again in 7 s."
    assert page["chat-error"].text == said
    assert page["words"].get_attribute("value") == "now?"
    failed = {"error": {"message": "a stage failed", "param": None, "type": "server_error", "code": None}}
    begun = events(({"content": "So "}, {})).removesuffix("data: [DONE]\n\n")
    answer_with(page, begun + f"event: error\ndata: {json.dumps(failed)}\n\n")
    page["send"].click()
    page.until(lambda: "a stage failed" in page["chat-error"].text)
    assert page.answers() == []


@pytest.mark.parametrize(("seconds", "shown"), [(3.87, ["0", "1.00 s", "2.00 s", "3.00 s"]), (2.0, ["0", "0.50 s"])])
def test_the_times_below_the_bars_stand_where_they_are(page: Talking, seconds: float, shown: list[str]) -> None:
    """Each label is below its time, the last one too; one at the very end ends there."""
    marks = page.later(
        """const [seconds, done] = arguments;
        const place = document.createElement("div");
        place.className = "timeline";
        place.style.width = "900px";
        document.body.append(place);
        import("/playground/timeline.js").then(({ draw }) => {
          draw(place, { stages: {} }, [], seconds);
          const axis = place.querySelector(".axis").getBoundingClientRect();
          const marks = [...place.querySelectorAll(".axis span")].map((label) => {
            const { left, right } = label.getBoundingClientRect();
            return [label.textContent, (left - axis.left) / axis.width, (right - axis.left) / axis.width];
          });
          place.remove();
          done(marks);
        })""",
        seconds,
    )
    assert [text for text, _, _ in marks][: len(shown)] == shown
    for text, left, right in marks[1:]:
        at = float(text.split()[0]) / seconds
        assert right <= 1.001 if at > 0.95 else (left + right) / 2 == pytest.approx(at, abs=0.002)
