"""The playground as a person uses it, for tests."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.entrypoints.openai.browser import resize, scheme

WAIT_S = 60
AXE = Path(__file__).with_name("vendor") / "axe-4.14.1.min.js.gz"
MODES = {"pictures": "prompt", "videos": "video-prompt", "chat": "words", "speech": "input"}
"""Part of the page -> its field for text."""

FORGET = """const done = arguments[0];
localStorage.clear(); sessionStorage.clear();
import("/playground/store.js")
  .then((store) => Promise.all(["runs", "turns", "clips", "films"].map(store.clear)))
  .then(() => done(null), (error) => done(String(error)));"""


class Page:
    """The page of a server, in one browser."""

    def __init__(self, driver: Chrome, url: str, mode: str | None) -> None:
        self.driver = driver
        self.url = url
        resize(driver, 1280, 900)
        scheme(driver, dark=False)
        driver.get("about:blank")
        driver.get_log("browser")  # of pages before this one
        self.open(mode)

    def open(self, mode: str | None) -> None:
        """Load one of its parts anew; None: whatever it shows first."""
        self.driver.get("about:blank")
        self.driver.get(self.url if mode is None else f"{self.url}/#{mode}")
        if mode is not None:
            self.until(lambda: self[MODES[mode]].is_displayed())

    def __getitem__(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        """Elements by CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *args: Any) -> Any:
        """The value of a script."""
        return self.driver.execute_script(script, *args)

    def later(self, script: str, *args: Any) -> Any:
        """The value that a script gives to its last argument."""
        return self.driver.execute_async_script(script, *args)

    def until(self, true: Callable[[], Any]) -> Any:
        """Wait for it."""
        return WebDriverWait(self.driver, WAIT_S, poll_frequency=0.03).until(lambda _: true())

    def type(self, **values: str) -> None:
        """Put texts into fields."""
        for name, text in values.items():
            field = self[name.replace("__", "-")]
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(text or Keys.DELETE)

    def press(self, *keys: str) -> None:
        """Press keys where the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def code(self, language: str, inside: str = "main:not([hidden]) ") -> str:
        """The code of the shown request."""
        self.all(f"{inside}.code [data-language={language}]")[0].click()
        return str(self.run("return document.querySelector(arguments[0]).textContent", f"{inside}.code pre"))

    def forget(self) -> None:
        """What the browser keeps for the page is gone."""
        assert self.later(FORGET) is None

    def barriers(self) -> list[str]:
        """What axe finds: WCAG 2.2 A and AA, and good practice."""
        self.run(gzip.decompress(AXE.read_bytes()).decode())
        found: list[str] = self.later(
            """const done = arguments[0];
            axe.run(document, {resultTypes: ["violations"]}).then((results) => done(results.violations.flatMap((one) =>
              one.nodes.map((node) => `${one.id}: ${node.html.slice(0, 120)} ${node.failureSummary}`))));"""
        )
        return found

    def overflow(self) -> list[str]:
        """What stands beyond the sides of the page, but for what scrolls by itself."""
        outside: list[str] = self.run(
            """const most = document.documentElement.clientWidth;
            const own = (e) => /auto|scroll|hidden|clip/.test(getComputedStyle(e).overflowX);
            const scrolls = (e) => e && (own(e) || scrolls(e.parentElement));
            const sides = (e) => [e.getBoundingClientRect().left, e.getBoundingClientRect().right];
            return [...document.querySelectorAll("body *")].filter((e) => e.offsetParent && !scrolls(e.parentElement))
              .filter((e) => e.offsetWidth && (sides(e)[0] < -1 || sides(e)[1] > most + 1))
              .map((e) => e.outerHTML.slice(0, 120))"""
        )
        wide = self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return outside + ([f"the page is {wide} pixels too wide"] if wide else [])


class Drawing(Page):
    """Its part for pictures."""

    def start(self, prompt: str, size: tuple[int, int] = (64, 64), **values: str) -> None:
        """Fill the form and press Ctrl+Enter."""
        given = {"negative_prompt": "", "seed": "", "num_inference_steps": "4", "n": "1", **values}
        self.type(prompt=prompt, width=str(size[0]), height=str(size[1]), **given)
        self["prompt"].send_keys(Keys.CONTROL, Keys.ENTER)

    def draw(self, prompt: str, size: tuple[int, int] = (64, 64), **values: str) -> None:
        """The same, and wait for the picture."""
        before = self.kept()
        self.start(prompt, size, **values)
        self.until(lambda: self.kept() == before + 1 and self["caption"].is_displayed())

    def kept(self) -> int:
        """Number of pictures in the history."""
        return int(self.run("return document.getElementById('count').textContent"))

    def facts(self) -> dict[str, str]:
        """What is said of the shown picture."""
        cells = [cell.text for cell in self.all("#facts > *")]
        return dict(zip(cells[::2], cells[1::2], strict=True))

    def invalid(self) -> list[str]:
        """Fields that are marked as wrong."""
        return [str(item.get_attribute("id")) for item in self.all("[aria-invalid=true]")]


class Talking(Page):
    """Its parts for chats and speech."""

    def ask(self, text: str) -> None:
        """Send a message and wait for the end of its answer."""
        self["words"].send_keys(text, Keys.ENTER)
        self.until(lambda: self.run("return document.getElementById('stop').hidden"))

    def as_text(self) -> None:
        """Answers are to be text alone."""
        self.all("#answer input[value=text]")[0].find_element(By.XPATH, "..").click()

    def attach(self, path: Path) -> None:
        """Choose a file."""
        count = len(self.all("#attached li"))
        self["files"].send_keys(str(path))
        self.until(lambda: len(self.all("#attached li")) == count + 1 or self["chat-error"].text)

    def answers(self) -> list[str]:
        """The answers' texts, as they are shown."""
        texts: list[str] = self.run(
            "return [...document.querySelectorAll('#turns .theirs .text')].map((e) => e.textContent)"
        )
        return texts

    def inspect(self, index: int = 0) -> None:
        """Open time and request of an answer."""
        self.all("main:not([hidden]) .foot [aria-expanded]")[index].click()
        self.until(lambda: self.all("main:not([hidden]) .inspector pre"))


def run_code(page: Page, folder: Path, language: str, **env: str) -> str:
    """Run the shown code in a folder, with the files that stand there; what it printed."""
    return run_text(page.code(language), folder, language, **env)


def run_text(text: str, folder: Path, language: str, **env: str) -> str:
    """Run code in a folder; what it printed."""
    folder.mkdir(exist_ok=True)
    (folder / "code").write_text(text, encoding="utf-8")
    command = ["sh" if language == "curl" else sys.executable, "code"]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", **env}
    made = subprocess.run(command, cwd=folder, env=env, check=True, timeout=60, capture_output=True)
    return made.stdout.decode()
