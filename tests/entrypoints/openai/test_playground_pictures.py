"""Pictures in the playground, in a real browser, against a real server with a tiny model."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys

from tests.entrypoints.openai.page import Drawing
from tests.entrypoints.openai.server import Server, error_of, picture_stages

pytestmark = pytest.mark.browser
PATH = "/v1/images/generations"
AWKWARD = "it's \"5 $HOME `ls` \\n"
"""A prompt that breaks what is not quoted well."""
LARGEST_SEED = "18446744073709551615"


@pytest.fixture
def page(tiny: Server, chrome: Chrome) -> Iterator[Drawing]:
    """A page without a history; what it wrote into the console must be nothing but refusals that a test provoked."""
    opened = Drawing(chrome, tiny.url, "pictures")
    yield opened
    opened.forget()
    lines = [line["message"] for line in chrome.get_log("browser")]
    assert [line for line in lines if PATH not in line] == []


def test_progress_picture_and_download(page: Drawing, tiny: Server, downloads: Path) -> None:
    page.run(
        """window.steps = []; window.said = [];
        new MutationObserver((all) => all.forEach((one) => window.steps.push(one.oldValue)))
          .observe(meter, {attributeFilter: ["aria-valuenow"], attributeOldValue: true});
        new MutationObserver(() => window.said.push(live.textContent))
          .observe(live, {childList: true, characterData: true, subtree: true});"""
    )
    page.draw("a heron", (96, 64), seed="7", num_inference_steps="6", negative_prompt="fog")
    steps = [int(step) for step in page.run("return window.steps") if step is not None]
    last = int(page["meter"].get_attribute("aria-valuenow") or 0)
    assert sorted({*steps, last} - {0}) == [1, 2, 3, 4, 5, 6]
    said = page.run("return window.said")
    assert (said[0], said[-1]) == ("Drawing.", "The picture is ready.")
    assert any(text.startswith("Step ") for text in said)
    facts = page.facts()
    assert (facts["size"], facts["steps"], facts["negative"], facts["seed"]) == ("96x64", "6", "fog", "7")
    (image,) = page.all("#canvas img")
    page.until(lambda: page.run("return arguments[0].complete", image))
    assert page.run("return [arguments[0].naturalWidth, arguments[0].naturalHeight]", image) == [96, 64]
    page["download"].click()
    file = downloads / "a-heron-7.png"
    page.until(file.exists)
    body = {"prompt": "a heron", "negative_prompt": "fog", "size": "96x64", "seed": 7, "num_inference_steps": 6}
    answer = tiny.post(PATH, body).json()
    assert file.read_bytes() == base64.b64decode(answer["data"][0]["b64_json"])


PREVIEWS = """window.seen = new Set();
window.urls = new Set();
new MutationObserver(() => canvas.querySelectorAll("img.preview").forEach((one) => {
  window.urls.add(one.src);
  one.decode().then(() => window.seen.add(`${one.naturalWidth}x${one.naturalHeight}`), () => {});
})).observe(canvas, {childList: true, subtree: true, attributeFilter: ["src"]});"""


def test_previews_are_shown_while_it_draws(page: Drawing) -> None:
    page.run(PREVIEWS)
    page.draw("in the making", (192, 128), num_inference_steps="12", partial_images="4")
    assert page.run("return window.urls.size") == 4
    sizes = page.run("return [...window.seen]")
    assert sizes
    for size in sizes:
        width, height = (int(side) for side in size.split("x"))
        assert width / height == 192 / 128
    page.draw("at once", partial_images="0")
    assert page.run("return window.urls.size") == 4
    assert page.all("#canvas img.preview") == []


def test_timeline(page: Drawing) -> None:
    page.draw("bars")
    parts = {str(bar.get_attribute("class")): bar.rect for bar in page.all("#timeline .track i")}
    assert {"encode", "denoise", "decode", "first", "browser"} <= set(parts)
    whole = parts["first"]["width"] + parts["browser"]["width"]
    stage = [rect["width"] for kind, rect in parts.items() if kind not in ("first", "browser")]
    assert 0.3 * whole < sum(stage) < 1.05 * whole
    assert parts["encode"]["x"] < parts["denoise"]["x"] < parts["decode"]["x"]
    label = str(page.all("#timeline .track")[0].get_attribute("aria-label"))
    assert label.startswith("0 QwenImage: ")
    assert re.search(r"steps [\d.]+ m?s, decode [\d.]+ m?s", label)


def test_code_really_runs(page: Drawing, tiny: Server, tmp_path: Path) -> None:
    page.draw(AWKWARD, negative_prompt="fog", seed=LARGEST_SEED, n="2")
    assert len(page.all("#canvas img")) == 2
    for language, command in (("curl", ["sh", "code"]), ("python", [sys.executable, "code"])):
        folder = tmp_path / language
        folder.mkdir()
        (folder / "code").write_text(page.code(language), encoding="utf-8")
        subprocess.run(command, cwd=folder, check=True, timeout=60)
    body = {"prompt": AWKWARD, "negative_prompt": "fog", "size": "64x64", "n": 2, "seed": int(LARGEST_SEED)}
    answer = tiny.post(PATH, {**body, "num_inference_steps": 4}).json()
    for index, item in enumerate(answer["data"]):
        for language in ("curl", "python"):
            made = (tmp_path / language / f"picture-{index}.png").read_bytes()
            assert made == base64.b64decode(item["b64_json"])


def test_copy(page: Drawing) -> None:
    page.draw("to copy")
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    text = page.code("python")
    assert f'"seed": {page.facts()["seed"]}' in text  # the seed that was drawn: the code makes the same picture
    copy = page.all("#pictures .copy")[0]
    copy.click()
    page.until(lambda: copy.text == "Copied")
    assert page.later("navigator.clipboard.readText().then(arguments[0])") == text


@pytest.mark.parametrize("way", ["button", "key"])
def test_cancel_stops_the_server_too(page: Drawing, tiny: Server, way: str) -> None:
    page.draw("before")
    page.start("long", (512, 512), num_inference_steps="200", negative_prompt="fog")
    page.until(lambda: page["phase"].text.startswith("step "))
    assert page.all("#gallery button[aria-current]")[0].text == "drawing"
    if way == "button":
        page["cancel"].click()
    else:
        page["prompt"].send_keys(Keys.ESCAPE)
    page.until(lambda: not page["progress"].is_displayed())
    page.until(lambda: tiny.http.get("/health").json()["open_requests"] == 0)
    assert page["said"].text == "before"
    assert page.kept() == 1
    page.draw("after")


def test_several_at_once(page: Drawing) -> None:
    page.start("first", (256, 256), num_inference_steps="30")
    page.start("second")
    assert len(page.all("#gallery li")) == 2
    page.until(lambda: page.kept() == 2)
    page.all("#gallery button")[1].click()
    assert (page["said"].text, page.facts()["steps"]) == ("first", "30")


@pytest.mark.parametrize(
    ("values", "field", "body"),
    [
        ({"width": "100"}, "width", {"size": "100x64"}),
        ({"height": ""}, "width", {"size": "64x"}),
        ({"num_inference_steps": "0"}, "num_inference_steps", {"num_inference_steps": 0}),
        ({"num_inference_steps": "many"}, "num_inference_steps", {"num_inference_steps": "many"}),
        ({"seed": LARGEST_SEED + "0"}, "seed", {"seed": int(LARGEST_SEED + "0")}),
        ({"n": "99"}, "n", {"n": 99}),
        ({"prompt": ""}, "prompt", {"prompt": ""}),
    ],
)
def test_errors_stand_beside_their_field(
    page: Drawing, tiny: Server, values: dict[str, str], field: str, body: dict[str, Any]
) -> None:
    page.type(prompt="x", width="64", height="64", seed="")
    page.type(**values)
    page["draw"].click()
    page.until(page.invalid)
    assert field in page.invalid()
    said = error_of(tiny.post(PATH, {"prompt": "x", "size": "64x64", **body}))
    error = page[f"{said['param']}-error"]
    assert error.text == said["message"]
    assert page[field].get_attribute("aria-describedby") == error.get_attribute("id")
    assert page.driver.switch_to.active_element == page[field]
    assert page["form-error"].text == ""
    page.type(**{field: "16"})
    assert (page.invalid(), error.text) == ([], "")


def test_a_busy_server_and_a_dead_one(chrome: Chrome, tmp_path: Path) -> None:
    """429 says when to come back; a server that is gone is said to be gone. What was typed stays."""
    name = ("--served-model-name", "painter", "--omni", "--model", "none")
    server = Server("--stage-configs-path", picture_stages(tmp_path), *name, "--max-queue", "1")
    page = Drawing(chrome, server.url, "pictures")
    page.type(prompt="hang", width="16", height="16")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: server.http.get("/health").json()["open_requests"] == 1)
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page["form-error"].text)
    assert re.fullmatch(r"The server is busy: 1 requests are open, .*\. Try again in \d+ s\.", page["form-error"].text)
    assert page["prompt"].get_attribute("value") == "hang"
    server.process.kill()
    server.process.wait()
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page["form-error"].text.startswith("The server cannot be reached"))
    page.until(lambda: page["health"].text == "not reachable")
    page.driver.get("about:blank")
    chrome.get_log("browser")


def test_key_in_copied_code(pictures: Server, chrome: Chrome, tmp_path: Path) -> None:
    """The code asks the environment for the key, and works with it."""
    page = Drawing(chrome, pictures.url, None)
    page.until(page["key"].is_displayed)
    page["key"].send_keys(pictures.api_key, Keys.ENTER)
    page.until(page["prompt"].is_displayed)
    page.type(prompt="steps")
    page["draw"].click()
    page.until(lambda: page.kept() == 1)
    made = subprocess.run(
        ["sh", "-c", page.code("curl") + " && cat answer.json"],
        cwd=tmp_path,
        env={**os.environ, "VLLM_API_KEY": pictures.api_key},
        capture_output=True,
        timeout=60,
    )
    assert b'"b64_json"' in made.stdout, made.stderr
    page.forget()
    chrome.get_log("browser")


# ---------------------------------------------------------------- history


def test_history_outlives_the_page(page: Drawing) -> None:
    page.draw("one", (64, 96), seed=LARGEST_SEED, negative_prompt="fog", num_inference_steps="5")
    page.draw("two")
    page.driver.refresh()
    page.until(lambda: page["width"].is_displayed() and page.kept() == 2)
    assert page["prompt"].get_attribute("value") == "two"  # the form is as it was left
    page.all("#gallery button")[1].send_keys(Keys.ENTER)
    page.until(lambda: page["said"].text == "one")
    facts = page.facts()
    assert (facts["seed"], facts["size"], facts["steps"]) == (LARGEST_SEED, "64x96", "5")
    page["again"].click()
    filled = {
        name: page[name].get_attribute("value") for name in ("prompt", "negative_prompt", "width", "height", "seed")
    }
    assert filled == {
        "prompt": "one",
        "negative_prompt": "fog",
        "width": "64",
        "height": "96",
        "seed": LARGEST_SEED,
    }
    page["remove"].click()
    page.until(lambda: page.kept() == 1)
    assert page["said"].text == "two"
    page["clear"].click()
    page.press(Keys.ESCAPE)
    assert page.kept() == 1  # asked first
    page["clear"].click()
    page.all("#sure button[value=yes]")[0].click()
    page.until(lambda: page.kept() == 0)
    page.driver.refresh()
    page.until(page["no-picture"].is_displayed)
    assert page.kept() == 0


FULL = """const done = arguments[0];
(async () => {
  const store = await import("/playground/store.js");
  const canvas = new OffscreenCanvas(64, 64);
  const pen = canvas.getContext("2d");
  for (let i = 0; i < 205; i++) {
    pen.fillStyle = `hsl(${7 * i} 60% 50%)`;
    pen.fillRect(0, 0, 64, 64);
    const blob = await canvas.convertToBlob();
    const body = {prompt: `picture ${i}`, size: "64x64", num_inference_steps: 4};
    const facts = {status: "done", seconds: 1, metrics: {seed: i}, size: "64x64", blobs: [blob], small: blob};
    await store.keep("runs", {id: `made-${i}`, at: i, body, ...facts});
  }
})().then(() => done(null), (error) => done(String(error)));"""


def test_a_full_history_stays_quick(page: Drawing) -> None:
    """A step or a picture more touches its own tile, not the other two hundred; the oldest make room."""
    assert page.later(FULL) is None
    page.driver.refresh()
    page.until(lambda: page["width"].is_displayed() and page.kept() == 205)
    page.run(
        """window.touched = 0;
        const count = (one) => one.addedNodes.length + one.removedNodes.length;
        new MutationObserver((all) => all.forEach((one) => window.touched += count(one)))
          .observe(gallery, {childList: true, subtree: true});"""
    )
    page.start("one more", num_inference_steps="20")
    page.until(lambda: page.kept() == 200)
    # One tile comes and its content changes once; six of the oldest go.
    assert page.run("return window.touched") <= 10
    assert page.run("return gallery.firstElementChild.firstElementChild.title") == "one more"
    page.run("window.touched = 0; gallery.children[150].firstElementChild.click()")
    assert page["said"].text.startswith("picture ")
    assert page.run("return window.touched") == 0
