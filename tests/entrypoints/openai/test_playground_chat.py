"""The playground's chat in a real browser, with a tiny model that hears and speaks."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.entrypoints.openai.browser import chromium, resize
from tests.entrypoints.openai.server import Server, error_of
from tests.entrypoints.openai.test_chat import ASK, PATH, sound_file

pytestmark = pytest.mark.browser
WAIT_S = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def chrome(folder: Path) -> Iterator[Chrome]:
    with chromium(folder) as driver:
        yield driver


@pytest.fixture
def chat(chrome: Chrome, omni_server: Server) -> Iterator[Chrome]:
    """The open page."""
    chrome.get(omni_server.url)
    until(chrome, "return !document.getElementById('chat').hidden")
    yield chrome
    assert [line["message"] for line in chrome.get_log("browser") if PATH not in line["message"]] == []


def until(driver: Chrome, script: str) -> None:
    WebDriverWait(driver, WAIT_S, poll_frequency=0.05).until(lambda _: driver.execute_script(script))


def ask(driver: Chrome, text: str) -> None:
    """Send a message and wait for the end of its answer."""
    driver.find_element(By.ID, "words").send_keys(text, Keys.CONTROL, Keys.ENTER)
    until(driver, "return document.getElementById('stop').hidden")


def answers(driver: Chrome) -> list[str]:
    return [item.text for item in driver.find_elements(By.CSS_SELECTOR, "#turns .theirs .text")]


def test_text_and_info(chat: Chrome, omni_server: Server) -> None:
    info = omni_server.http.get("/v1/omni/info").json()
    assert set(info["chat"]["inputs"]) == {"audio", "image", "video"}
    assert "ethan" in info["chat"]["voices"]
    assert "image" not in info
    Select(chat.find_element(By.ID, "voice")).select_by_value("text")
    ask(chat, ASK[0]["content"])
    wanted = omni_server.post(PATH, {"messages": ASK}).json()["choices"][0]["message"]["content"]
    text = chat.execute_script("return document.querySelector('#turns .theirs .text').textContent")
    assert text == wanted
    assert chat.find_elements(By.CSS_SELECTOR, ".sound") == []


def test_speech_is_played_drawn_and_saved(chat: Chrome, folder: Path) -> None:
    Select(chat.find_element(By.ID, "voice")).select_by_value("voice:ethan")
    ask(chat, ASK[0]["content"])
    until(chat, "return document.querySelector('.sound button').textContent === 'Play'")  # it has been heard
    painted = """const canvas = document.querySelector(".sound canvas");
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return data.filter((value, index) => index % 4 === 3 && value > 0).length"""
    assert chat.execute_script(painted) > 500
    chat.find_element(By.CSS_SELECTOR, ".sound a").click()
    file = folder / "downloads" / "answer.wav"
    WebDriverWait(chat, WAIT_S).until(lambda _: file.exists())
    with wave.open(str(file)) as saved:
        assert (saved.getframerate(), saved.getnchannels()) == (24000, 1)
        length = saved.getnframes() / 24000
    shown = str(chat.find_element(By.CSS_SELECTOR, ".sound canvas").get_attribute("aria-label"))
    assert shown.startswith("Waveform, ")
    assert length > 0


def test_files_and_errors(chat: Chrome, omni_server: Server, tmp_path: Path) -> None:
    Select(chat.find_element(By.ID, "voice")).select_by_value("text")
    (tmp_path / "noise.wav").write_bytes(sound_file())
    chat.find_element(By.ID, "files").send_keys(str(tmp_path / "noise.wav"))
    until(chat, "return document.querySelectorAll('#attached li').length === 1")
    ask(chat, "what is it")
    assert len(chat.find_elements(By.CSS_SELECTOR, "#turns .mine audio")) == 1
    assert len(answers(chat)) == 1
    (tmp_path / "bad.wav").write_bytes(b"not a sound")
    chat.find_element(By.ID, "files").send_keys(str(tmp_path / "bad.wav"))
    until(chat, "return document.querySelectorAll('#attached li').length === 1")
    ask(chat, "and this")
    part = {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,bm90IGEgc291bmQ="}}
    said = error_of(omni_server.post(PATH, {"messages": [{"role": "user", "content": [part]}]}))["message"]
    shown = chat.find_element(By.ID, "chat-error").text
    assert shown.rpartition(": ")[2] == said.rpartition(": ")[2]
    assert len(answers(chat)) == 1
    assert chat.find_element(By.ID, "words").get_attribute("value") == "and this"


def test_microphone(chat: Chrome) -> None:
    """Chromium's own test tone, through the page's recorder, is heard by the model."""
    Select(chat.find_element(By.ID, "voice")).select_by_value("text")
    button = chat.find_element(By.ID, "record")
    button.click()
    until(chat, "return document.getElementById('record').getAttribute('aria-pressed') === 'true'")
    chat.execute_async_script("setTimeout(arguments[0], 400)")  # what is recorded
    button.click()
    until(chat, "return document.querySelectorAll('#attached li').length === 1")
    ask(chat, "what is it")
    assert chat.find_element(By.ID, "chat-error").text == ""
    assert len(answers(chat)) == 1


def test_phone(chat: Chrome) -> None:
    resize(chat, 320, 700)
    assert chat.execute_script("return document.documentElement.scrollWidth") <= 320
