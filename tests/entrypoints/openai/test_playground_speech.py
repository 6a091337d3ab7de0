"""Speech in the playground, in a real browser, with a tiny model that speaks."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from tests.entrypoints.openai.page import Talking, run_code
from tests.entrypoints.openai.server import Server

pytestmark = pytest.mark.browser
PATH = "/v1/audio/speech"
TEXT = "it's \"5 $HOME `ls` \\n \\ $(id)"
"""A text that breaks what is not quoted well."""


@pytest.fixture
def page(chrome: Chrome, omni_server: Server) -> Iterator[Talking]:
    """A page on which nothing was spoken."""
    opened = Talking(chrome, omni_server.url, "speech")
    yield opened
    opened.forget()
    assert [line["message"] for line in chrome.get_log("browser") if PATH not in line["message"]] == []


def samples(path: Path) -> Any:
    """The samples of a WAV file."""
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels()) == (24000, 1)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(int)


def test_a_text_is_spoken_and_kept(page: Talking, downloads: Path, tmp_path: Path) -> None:
    Select(page["speech-voice"]).select_by_value("ethan")
    page["input"].send_keys(TEXT, Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.all("#clips .sound[data-state=quiet]"))  # it has been heard
    page.all("#clips .sound .quiet")[0].click()
    file = downloads / "speech.wav"
    page.until(file.exists)
    heard = samples(file)
    file.unlink()
    page.inspect()
    rows = [str(row.get_attribute("aria-label")).split(":")[0] for row in page.all(".inspector .track")]
    assert rows == ["0 Thinker", "1 Talker", "2 Code2Wav", "browser"]
    for language in ("curl", "python"):
        run_code(page, tmp_path / language, language)
        again = samples(tmp_path / language / "speech.wav")
        assert len(again) == len(heard)
        assert np.abs(again - heard).max() <= 8
    page.driver.refresh()
    page.until(lambda: page.all("#clips .sound"))
    page.type(input="x")
    again, _, delete = page.all("#clips .foot button")
    again.click()
    assert page["input"].get_attribute("value") == TEXT
    delete.click()
    page.until(page["no-clips"].is_displayed)


def test_a_text_that_is_refused(page: Talking) -> None:
    page["speak"].click()
    page.until(lambda: page["input"].get_attribute("aria-invalid"))
    assert "input" in page["input-error"].text
    assert page.driver.switch_to.active_element == page["input"]
    assert page["speak"].is_displayed()
