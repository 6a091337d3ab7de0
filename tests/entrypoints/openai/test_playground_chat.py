"""Chats in the playground, in a real browser, with a tiny model that hears, sees and speaks."""

from __future__ import annotations

import base64
import json
import re
import wave
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from tests.entrypoints.openai.page import Talking, run_code
from tests.entrypoints.openai.server import Server, error_of
from tests.entrypoints.openai.test_chat import ASK, PATH, sound_file

pytestmark = pytest.mark.browser
QUESTION = ASK[0]["content"]
AWKWARD = "it's \"5 $HOME `ls` \\n \\ $(id)"


@pytest.fixture
def chat(chrome: Chrome, omni_server: Server) -> Iterator[Talking]:
    """A page without a conversation."""
    opened = Talking(chrome, omni_server.url, "chat")
    yield opened
    opened.forget()
    assert [line["message"] for line in chrome.get_log("browser") if PATH not in line["message"]] == []


def words(text: str) -> str:
    """What stays of a text when Markdown is shown."""
    return re.sub(r"[\s*_`#~>-]", "", text)


def copied(page: Talking, index: int = -1) -> str:
    """What the button of an answer copies: the model's own text."""
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
    button = page.all("#turns .theirs .foot button")[index]
    assert button.text == "Copy"
    button.click()
    page.until(lambda: button.text == "Copied")
    return str(page.later("navigator.clipboard.readText().then(arguments[0])"))


def whole_answer(server: Server, messages: Any = ASK) -> str:
    return str(server.post(PATH, {"messages": messages}).json()["choices"][0]["message"]["content"])


def test_text(chat: Talking, omni_server: Server) -> None:
    chat.as_text()
    chat.ask(QUESTION)
    wanted = whole_answer(omni_server)
    assert copied(chat, 0) == wanted
    assert words(chat.answers()[0]) == words(wanted)
    assert chat.all(".sound") == []
    assert re.fullmatch(r"first word [\d.]+ m?s · 8 tokens · [\d.]+ m?s", chat.all("#turns .theirs .foot .num")[0].text)


HELD = """window.played = [];
const begun = new Promise((resolve) => {
  const start = AudioBufferSourceNode.prototype.start;
  AudioBufferSourceNode.prototype.start = function (when) {
    window.played.push([when, this.buffer.length, this.buffer.sampleRate, this.context.sampleRate]);
    resolve();
    return start.call(this, when);
  };
});
const real = window.fetch;
window.fetch = async (path, options) => {
  const answer = await real(path, options);
  if (!path.includes("chat")) return answer;
  const events = (await answer.text()).split(/(?<=\\n\\n)/);
  const first = events.findIndex((event) => event.includes('"data":')) + 1;
  const stream = new ReadableStream({
    async start(to) {
      const put = (some) => to.enqueue(new TextEncoder().encode(some.join("")));
      put(events.slice(0, first));
      await begun;  // the others come when the first is playing
      put(events.slice(first));
      to.close();
    },
  });
  return new Response(stream, answer);
};"""


def test_speech_is_played_without_gaps_from_its_first_piece(chat: Talking, downloads: Path) -> None:
    chat.run(HELD)
    Select(chat["voice"]).select_by_value("ethan")
    chat.ask(QUESTION)
    pieces = chat.run("return window.played")
    assert len(pieces) >= 2
    for (when, length, rate, own), (next_when, *_) in pairwise(pieces):
        assert rate == own == 24000  # nothing is resampled between the pieces
        assert (next_when - when) * rate == pytest.approx(length, abs=1e-3)
        assert when * rate == pytest.approx(round(when * rate), abs=1e-3)  # on a whole sample
    chat.until(lambda: chat.all(".sound[data-state=quiet]"))  # it has been heard
    chat.all(".sound .quiet")[0].click()
    file = downloads / "answer.wav"
    chat.until(file.exists)
    with wave.open(str(file)) as saved:
        assert (saved.getframerate(), saved.getnchannels()) == (24000, 1)
        frames = saved.getnframes()
    file.unlink()
    assert frames == sum(length for _, length, _, _ in pieces)


def test_waveform_and_its_keys(chat: Talking) -> None:
    chat.ask(QUESTION)
    chat.until(lambda: chat.all(".sound[data-state=quiet]"))
    (canvas,) = chat.all(".sound canvas")
    painted = """const {width, height} = arguments[0];
    const {data} = arguments[0].getContext("2d").getImageData(0, 0, width, height);
    return data.filter((value, index) => index % 4 === 3 && value > 0).length"""
    assert chat.run(painted, canvas) > 500
    length = float(canvas.get_attribute("aria-valuemax") or 0)
    assert length > 0
    canvas.send_keys(Keys.END)
    chat.until(lambda: float(canvas.get_attribute("aria-valuenow") or 0) == length)
    canvas.send_keys(Keys.HOME)
    chat.until(lambda: float(canvas.get_attribute("aria-valuenow") or 1) == 0)
    canvas.send_keys(Keys.SPACE)
    chat.until(lambda: chat.all(".sound button[aria-label=Pause]"))
    chat.until(lambda: chat.all(".sound button[aria-label=Play]"))  # to its end


def film(path: Path) -> None:
    """Half a second of a moving grey."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for grey in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * grey, np.uint8))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A picture, a sound and a video; the sound's name needs care."""
    paths = [tmp_path / name for name in ("grey.png", "my sound's.wav", "film.mp4")]
    Image.new("RGB", (56, 56), (9, 99, 199)).save(paths[0])
    paths[1].write_bytes(sound_file(0.3))
    film(paths[2])
    return paths


def kept(page: Talking) -> list[dict[str, Any]]:
    """The turns that the browser keeps; of their sound, the number of samples."""
    turns: list[dict[str, Any]] = page.later(
        """const done = arguments[0];
        import("/playground/store.js").then((store) => store.all("turns")).then((turns) =>
          done(turns.map(({settings, ...turn}) => ({...turn, sound: turn.sound?.length ?? 0}))));"""
    )
    return turns


def save_files(page: Talking, downloads: Path, folder: Path) -> None:
    """Save what the code reads by the buttons beside it."""
    folder.mkdir(exist_ok=True)
    for button in page.all(".inspector .files button"):
        button.click()
        file = downloads / button.text
        page.until(file.exists)
        (folder / button.text).write_bytes(file.read_bytes())
        file.unlink()


def streamed_text(events: str) -> str:
    """The text in the events that curl prints."""
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def test_code_of_a_conversation_really_runs(chat: Talking, files: list[Path], downloads: Path, tmp_path: Path) -> None:
    """Every kind of file, an awkward question, an answer before it, settings: both languages get the page's answer."""
    chat.as_text()
    chat.type(system="You are brief.", **{"chat__max_completion_tokens": "6"})
    for path in files:
        chat.attach(path)
    chat.ask(AWKWARD)
    assert [len(chat.all(f"#turns .mine {tag}")) for tag in ("img", "audio", "video")] == [1, 1, 1]
    chat.ask("and " + AWKWARD)
    chat.inspect(1)
    names = [button.text for button in chat.all(".inspector .files button")]
    assert names == ["grey.png", "file-2.wav", "film.mp4"]
    save_files(chat, downloads, tmp_path / "files")
    assert (tmp_path / "files" / "grey.png").read_bytes() == files[0].read_bytes()
    for language in ("curl", "python"):
        printed = run_code(chat, tmp_path / "files", language)
        said = streamed_text(printed) if language == "curl" else printed.removesuffix("\n")
        assert said == kept(chat)[1]["text"] != ""


def test_code_of_speech_really_runs(chat: Talking, tmp_path: Path) -> None:
    Select(chat["voice"]).select_by_value("aiden")
    chat.ask(AWKWARD)
    (turn,) = kept(chat)
    chat.inspect()
    for language in ("curl", "python"):
        assert run_code(chat, tmp_path / language, language).rstrip("\n") == turn["text"].rstrip("\n")
        with wave.open(str(tmp_path / language / "answer.wav")) as saved:
            assert saved.getnframes() == turn["sound"]


def test_timeline_of_a_chat(chat: Talking) -> None:
    """Each stage has its bars: where they begin, and how long they last, as the server says."""
    chat.ask(QUESTION)
    chat.inspect()
    rows = [str(row.get_attribute("aria-label")) for row in chat.all(".inspector .track")]
    assert [row.split(":")[0] for row in rows] == ["0 Thinker", "1 Talker", "2 Code2Wav", "browser"]
    assert all(re.search(r"\brun [\d.]+ m?s", row) for row in rows[:3])
    runs = [bar.rect for bar in chat.all(".inspector .track i.run")]
    assert runs[0]["x"] < runs[1]["x"] < runs[2]["x"]
    legend = chat.all(".inspector .legend")[0].text
    assert "run" in legend
    chat.all("#turns .foot [aria-expanded=true]")[0].click()
    assert chat.all(".inspector") == []


def test_conversation_outlives_the_page(chat: Talking) -> None:
    chat.ask(QUESTION)
    chat.ask("and now")
    before = chat.answers()
    chat.driver.refresh()
    chat.until(lambda: chat["words"].is_displayed())
    assert chat.answers() == before
    chat.until(lambda: chat.all("#turns .sound button[aria-label=Play]"))
    chat["new-chat"].click()
    chat.until(lambda: chat["welcome"].is_displayed())
    chat["bring-back"].click()
    assert chat.answers() == before
    chat["new-chat"].click()
    chat.until(lambda: kept(chat) == [])
    chat.driver.refresh()
    chat.until(lambda: chat["welcome"].is_displayed())
    assert chat.answers() == []
    chat.all("#ideas button")[0].click()
    assert chat["words"].get_attribute("value") == chat.all("#ideas button")[0].text


def test_refusals_are_kind(chat: Talking, omni_server: Server, tmp_path: Path) -> None:
    chat.as_text()
    (tmp_path / "bad.wav").write_bytes(b"not a sound")
    chat.attach(tmp_path / "bad.wav")
    chat.ask("and this")
    part = {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,bm90IGEgc291bmQ="}}
    said = error_of(omni_server.post(PATH, {"messages": [{"role": "user", "content": [part]}]}))["message"]
    assert chat["chat-error"].text.rpartition(": ")[2] == said.rpartition(": ")[2]
    assert chat.answers() == []
    assert chat["words"].get_attribute("value") == "and this"
    assert len(chat.all("#attached li")) == 1
    chat.all("#attached button")[0].click()
    (tmp_path / "notes.txt").write_text("x")
    chat.attach(tmp_path / "notes.txt")
    assert "notes.txt: omni reads" in chat["chat-error"].text
    (tmp_path / "large.wav").write_bytes(bytes(1_100_000))
    chat.attach(tmp_path / "large.wav")
    assert chat["chat-error"].text == "large.wav is too large: 1.0 MiB; the server takes 1.0 MiB."
    chat.type(**{"chat__temperature": "3"})
    chat["send"].click()
    chat.until(lambda: chat["chat-temperature"].get_attribute("aria-invalid"))
    assert "temperature" in chat["chat-temperature-error"].text
    assert chat.driver.switch_to.active_element == chat["chat-temperature"]


def test_microphone(chat: Talking) -> None:
    """Chromium's own test tone, through the page's recorder, is heard by the model."""
    chat.as_text()
    chat["record"].click()
    chat.until(lambda: chat["record"].get_attribute("aria-pressed") == "true")
    chat["words"].send_keys(Keys.ESCAPE)
    chat.until(lambda: chat["record"].get_attribute("aria-pressed") == "false")
    assert chat.all("#attached li") == []
    chat["record"].click()
    # The tone beeps once a second: what is recorded is over when it has been loud.
    chat.until(lambda: float(chat.run("return level.value")) > 0.1)
    chat["record"].click()
    chat.until(lambda: len(chat.all("#attached li")) == 1)
    chat.ask("what is it")
    assert chat["chat-error"].text == ""
    (turn,) = kept(chat)
    assert turn["files"][0]["name"] == "recording-1.wav"
    assert turn["text"] != ""


def test_stop_ends_it_on_the_server_too(chat: Talking, omni_server: Server) -> None:
    chat.run(
        """const real = window.fetch;
        window.fetch = async (path, options) => {
          const answer = await real(path, options);
          if (!path.includes("chat")) return answer;
          const reader = answer.body.getReader();  // the first piece comes, the others are held back
          const first = await reader.read();
          const held = new ReadableStream({
            start(to) {
              to.enqueue(first.value);
              options.signal.addEventListener("abort", () => { reader.cancel(); to.error(options.signal.reason); });
            },
          });
          return new Response(held, answer);
        };"""
    )
    chat["words"].send_keys(QUESTION, Keys.ENTER)
    chat.until(lambda: chat["stop"].is_displayed())
    chat["words"].send_keys(Keys.ESCAPE)
    chat.until(lambda: chat["send"].is_displayed())
    assert chat.all("#turns .theirs .foot .num")[0].text.startswith("stopped")
    chat.until(lambda: omni_server.http.get("/health").json()["open_requests"] == 0)
    assert chat["live"].text == "Stopped."


def test_keys_of_the_composer(chat: Talking) -> None:
    chat.as_text()
    chat["words"].send_keys("one", Keys.SHIFT, Keys.ENTER)
    chat["words"].send_keys("two")
    assert chat["words"].get_attribute("value") == "one\ntwo"
    chat["words"].send_keys(Keys.CONTROL, Keys.ENTER)
    chat.until(lambda: len(chat.answers()) == 1)
    assert chat.all("#turns .mine .text")[0].text == "one\ntwo"
    chat.until(lambda: chat["send"].is_displayed())
    chat.all("#turns .mine .foot button")[0].click()
    assert chat["words"].get_attribute("value") == "one\ntwo"


def test_pictures_by_chat(chrome: Chrome, pictures: Server, tmp_path: Path) -> None:
    page = Talking(chrome, pictures.url, None)
    page.until(page["key"].is_displayed)
    page["key"].send_keys(pictures.api_key, Keys.ENTER)
    page.until(lambda: page.all("#modes a"))
    page.all("#modes a")[1].click()
    page.until(page["words"].is_displayed)
    assert not page["answer"].is_displayed()
    page.type(**{"chat__num_inference_steps": "3", "chat__seed": "7"})
    page.ask("a heron in steps")
    page.until(lambda: page.all("#turns .theirs img"))
    page.inspect()
    assert page.all(".inspector .track i.run")
    (turn,) = kept(page)
    shown = base64.b64decode(turn["pictures"][0].partition(",")[2])
    for language in ("curl", "python"):
        run_code(page, tmp_path / language, language, VLLM_API_KEY=pictures.api_key)
        assert (tmp_path / language / "picture-0.png").read_bytes() == shown
    page.forget()
    chrome.get_log("browser")
