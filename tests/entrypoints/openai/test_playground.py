"""The playground in a real browser, against a real server with a tiny model."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.entrypoints.openai.browser import chromium, resize, scheme
from tests.entrypoints.openai.server import Server, error_of
from vllm_omni.diffusion.models.qwen_image.defaults import QWEN_IMAGE
from vllm_omni.diffusion.tiny_models import make_tiny_model

PATH = "/v1/images/generations"
FOLDER = Path(__file__).parents[3] / "vllm_omni" / "entrypoints" / "openai" / "playground"
WAIT_S = 30
AWKWARD = "it's \"5 $HOME `ls` \\n"
"""A prompt that breaks what is not quoted well."""
LARGEST_SEED = "18446744073709551615"

browser_test = pytest.mark.browser


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves a tiny model, without a key."""
    folder = make_tiny_model("qwen-image", tmp_path_factory.mktemp("tiny"))
    server = Server("--model", str(folder), "--served-model-name", "tiny")
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser") / "downloads"


@pytest.fixture(scope="module")
def chrome(downloads: Path) -> Iterator[Chrome]:
    with chromium(downloads.parent) as driver:
        yield driver


class Page:
    """The page as a person uses it."""

    def __init__(self, driver: Chrome, url: str) -> None:
        self.driver = driver
        resize(driver, 1280, 900)
        scheme(driver, dark=False)
        driver.get(url)

    def __getitem__(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *args: Any) -> Any:
        return self.driver.execute_script(script, *args)

    def until(self, true: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, WAIT_S, poll_frequency=0.05).until(lambda _: true())

    def type(self, **values: str) -> None:
        for name, text in values.items():
            self[name].send_keys(Keys.CONTROL, "a")
            self[name].send_keys(text or Keys.DELETE)

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
        return int(self["count"].text)

    def facts(self) -> dict[str, str]:
        cells = [cell.text for cell in self.all("#facts > *")]
        return dict(zip(cells[::2], cells[1::2], strict=True))

    def invalid(self) -> list[str]:
        return [str(item.get_attribute("id")) for item in self.all("[aria-invalid=true]")]

    def code(self, language: str) -> str:
        self.all(f"[data-language={language}]")[0].click()
        return str(self["code"].text)

    def forget_all(self) -> None:
        """Empty the history, as the page does it."""
        self["clear"].click()
        self.all("#sure button[value=yes]")[0].click()
        self.until(lambda: self.kept() == 0)


@pytest.fixture
def page(tiny: Server, chrome: Chrome) -> Iterator[Page]:
    """A page without a history; what it wrote into the console must be nothing but refusals that a test provoked."""
    opened = Page(chrome, tiny.url)
    opened.until(lambda: opened["width"].is_displayed())
    yield opened
    if opened.kept():
        opened.forget_all()
    opened.run("localStorage.clear()")
    lines = [line["message"] for line in chrome.get_log("browser")]
    assert [line for line in lines if PATH not in line and "/v1/omni/info" not in line] == []


# ---------------------------------------------------------------- without a browser


def test_files_of_the_page(tiny: Server) -> None:
    names = {path.name for path in FOLDER.iterdir()}
    pages = {"/": "index.html", **{f"/playground/{name}": name for name in names}}
    named = set()
    for path, name in pages.items():
        answer = tiny.http.get(path)
        assert (answer.status_code, answer.content) == (200, (FOLDER / name).read_bytes())
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = tiny.http.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert (policy["default-src"], policy["script-src"], policy["connect-src"]) == ("'none'", "'self'", "'self'")
        assert "unsafe" not in str(policy)
        named |= set(re.findall(r'(?:src|href)="/playground/([^"]+)"|from "\./([^"]+)"', answer.text))
        elsewhere = set(re.findall(r"https?://[^\s\"'`]*", answer.text)) - {"http://www.w3.org/2000/svg"}
        assert elsewhere == set(), f"{name} names {elsewhere}"
    assert {first or second for first, second in named} == names - {"index.html"}
    for path in ("/playground/page.py", "/playground/..%2fpage.py", "/playground/", "/index.html", "/nothing"):
        answer = tiny.http.get(path)
        assert answer.status_code == 404
        assert error_of(answer)["type"] == "invalid_request_error"


def test_info_is_what_the_model_takes(tiny: Server) -> None:
    info = tiny.http.get("/v1/omni/info").json()
    (stage,) = info["stages"]
    assert (info["model"], info["output_modalities"]) == ("tiny", ["image"])
    assert (stage["name"], stage["device"], stage["output"]) == ("QwenImagePipeline", "cpu", "image")
    size, parameters = info["image"]["size"], info["image"]["parameters"]
    assert (size["default"], size["multiple"]) == ([QWEN_IMAGE.width, QWEN_IMAGE.height], QWEN_IMAGE.multiple)
    assert "guidance_scale" not in parameters  # the model has none
    assert parameters["true_cfg_scale"]["default"] == QWEN_IMAGE.true_cfg_scale
    for name in ("num_inference_steps", "true_cfg_scale", "n"):
        for bound, step in (("minimum", -1), ("maximum", 1)):
            answer = tiny.post(PATH, {"prompt": "x", name: parameters[name][bound] + step})
            assert (answer.status_code, error_of(answer)["param"]) == (400, name)
    side = int(size["max_pixels"] ** 0.5) + size["multiple"]
    assert error_of(tiny.post(PATH, {"prompt": "x", "size": f"{side}x{side}"}))["param"] == "size"


def test_info_without_tables_of_the_model(pictures: Server) -> None:
    """A stage that tells nothing of itself: the bounds of the endpoint stand, and there are no defaults."""
    image = pictures.http.get("/v1/omni/info").json()["image"]
    words = pictures.process.args
    assert isinstance(words, list)
    most = int(words[words.index("--max-generated-image-size") + 1])
    assert image["parameters"]["guidance_scale"] == {"default": None, "minimum": 0, "maximum": 20}
    assert image["size"] == {"default": [None, None], "multiple": 1, "max_pixels": most}


# ---------------------------------------------------------------- drawing


@browser_test
def test_progress_picture_and_download(page: Page, tiny: Server, downloads: Path) -> None:
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


@browser_test
def test_timeline(page: Page) -> None:
    page.draw("bars")
    browser = page.all(".track .browser")[0]
    parts = {str(bar.get_attribute("class")): bar.rect for bar in page.all(".track i")}
    assert {"encode", "denoise", "decode", "browser"} <= set(parts)
    whole = browser.rect["width"]
    stage = [rect["width"] for kind, rect in parts.items() if kind != "browser"]
    assert 0.3 * whole < sum(stage) < 1.05 * whole
    assert parts["encode"]["x"] < parts["denoise"]["x"] < parts["decode"]["x"]
    label = str(page.all(".track")[0].get_attribute("aria-label"))
    assert label.startswith("0 QwenImagePipeline: ")
    assert re.search(r"steps [\d.]+ m?s, decode [\d.]+ m?s", label)


@browser_test
def test_code_really_runs(page: Page, tiny: Server, downloads: Path, tmp_path: Path) -> None:
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


@browser_test
def test_copy(page: Page) -> None:
    page.draw("to copy")
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    text = page.code("python")
    assert f'"seed": {page.facts()["seed"]}' in text  # the seed that was drawn: the code makes the same picture
    page["copy"].click()
    page.until(lambda: page["copy"].text == "Copied")
    pasted = page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert pasted == text


@browser_test
def test_cancel_stops_the_server_too(page: Page, tiny: Server) -> None:
    page.draw("before")
    page.start("long", (512, 512), num_inference_steps="200", negative_prompt="fog")
    page.until(lambda: page["phase"].text.startswith("step "))
    assert page.all("#gallery button[aria-current]")[0].text == "drawing"
    page["cancel"].click()
    page.until(lambda: not page["progress"].is_displayed())
    page.until(lambda: tiny.http.get("/health").json()["open_requests"] == 0)
    assert page["said"].text == "before"
    assert page.kept() == 1
    page.draw("after")


@browser_test
def test_several_at_once(page: Page) -> None:
    page.start("first", (256, 256), num_inference_steps="30")
    page.start("second")
    assert len(page.all("#gallery li")) == 2
    page.until(lambda: page.kept() == 2)
    page.all("#gallery button")[1].click()
    assert (page["said"].text, page.facts()["steps"]) == ("first", "30")


@browser_test
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
    page: Page, tiny: Server, values: dict[str, str], field: str, body: dict[str, Any]
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


# ---------------------------------------------------------------- history


@browser_test
def test_history_outlives_the_page(page: Page) -> None:
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
    page.forget_all()
    page.driver.refresh()
    page.until(lambda: page["width"].is_displayed())
    assert page.kept() == 0


# ---------------------------------------------------------------- everybody can use it


@browser_test
def test_keyboard_and_names(page: Page) -> None:
    page.draw("for the keyboard")
    shown = [item for item in page.all("input, textarea, select, button, a, pre") if item.is_displayed()]
    nameless = [item.get_attribute("outerHTML") for item in shown if not item.accessible_name.strip()]
    sliders = [item for item in shown if item.get_attribute("type") == "range"]
    assert len(nameless) == len(sliders) == 2, nameless  # each doubles a field, which has the name and the keys
    page["prompt"].click()
    reached = []
    for _ in range(40):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        focused = page.driver.switch_to.active_element
        if focused.tag_name == "body":
            break
        assert page.run("return getComputedStyle(arguments[0]).outlineStyle", focused) != "none"
        reached.append(focused.get_attribute("id"))
    wanted = ["negative_prompt", "width", "height", "num_inference_steps", "seed", "draw", "download", "copy", "code"]
    assert [name for name in reached if name in wanted][:6] == wanted[:6]
    assert set(wanted) <= set(reached)
    page["num_inference_steps"].send_keys(Keys.ARROW_UP)
    assert page["num_inference_steps"].get_attribute("value") == "5"
    page["width"].send_keys(Keys.ARROW_DOWN)
    assert page["width"].get_attribute("value") == "48"


CONTRAST = """
const light = (text) => {
  const linear = (c) => (c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  const [r, g, b] = text.match(/[\\d.]+/g).map((c) => linear(c / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
const behind = (e) => {
  const colour = getComputedStyle(e).backgroundColor;
  return e.parentElement && (colour === "transparent" || colour.startsWith("rgba(")) ? behind(e.parentElement) : colour;
};
return [...document.querySelectorAll("p, dt, dd, label, legend, h1, h2, button, pre, #timeline .num")]
  .filter((e) => e.offsetParent && e.textContent.trim() && !e.disabled)
  .map((e) => [e.outerHTML.slice(0, 80), [light(getComputedStyle(e).color), light(behind(e))].sort((a, b) => b - a)])
  .map(([what, [high, low]]) => [what, (high + .05) / (low + .05)]).filter(([, ratio]) => ratio < 4.5);
"""


@browser_test
def test_dark_and_light(page: Page) -> None:
    def background() -> int:
        colour = page.run("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    page.draw("colours")
    page.type(n="99")
    page["draw"].click()
    page.until(page.invalid)
    assert background() > 600
    assert page.run(CONTRAST) == []
    scheme(page.driver, dark=True)
    assert background() < 150
    assert page.run(CONTRAST) == []
    page.all("#theme input[value=light]")[0].find_element(By.XPATH, "..").click()
    assert background() > 600
    page.driver.refresh()
    page.until(lambda: page["width"].is_displayed())
    assert background() > 600


@browser_test
@pytest.mark.parametrize("width", [320, 390])
def test_phone(page: Page, width: int) -> None:
    resize(page.driver, width, 700)
    page.draw("w" * 90, (256, 64), num_inference_steps="0004")
    assert page.run("return document.documentElement.scrollWidth") <= width
    outside = page.run(
        """return [...document.querySelectorAll("input, textarea, select, button, img")]
        .filter((e) => e.offsetParent && !e.closest("#gallery, .switch"))
        .filter((e) => e.getBoundingClientRect().right > innerWidth || e.getBoundingClientRect().left < 0)
        .map((e) => e.outerHTML)"""
    )
    assert outside == []


# ---------------------------------------------------------------- nothing leaves the server


@browser_test
def test_nothing_leaves_the_origin(page: Page, tiny: Server) -> None:
    page.draw("at home")
    names = page.run("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert len(names) >= 8
    assert [name for name in names if not name.startswith((tiny.url + "/", f"blob:{tiny.url}/"))] == []
    refused = page.driver.execute_async_script(
        """const done = arguments[0];
        addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
        fetch("http://127.0.0.1:9/").catch(() => {});"""
    )
    assert refused == "connect-src"
    assert page.run("try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name }") == "TypeError"
    page.driver.get_log("browser")  # the violations that were provoked


@browser_test
def test_key(pictures: Server, chrome: Chrome, tmp_path: Path) -> None:
    page = Page(chrome, pictures.url)
    page.until(lambda: page["key"].is_displayed())
    assert not page["work"].is_displayed()
    page["key"].send_keys("wrong", Keys.ENTER)
    page.until(lambda: page["notice"].text == "the API key is missing or wrong")
    page.type(key=pictures.api_key)
    page["key"].send_keys(Keys.ENTER)
    page.until(lambda: page["work"].is_displayed())
    page.type(prompt="steps")
    page["draw"].click()
    page.until(lambda: page.kept() == 1)
    assert pictures.api_key not in page["code"].text
    assert '"Authorization: Bearer $VLLM_API_KEY"' in page.code("curl")
    made = subprocess.run(
        ["sh", "-c", page.code("curl") + " && cat answer.json"],
        cwd=tmp_path,
        env={**os.environ, "VLLM_API_KEY": pictures.api_key},
        capture_output=True,
        timeout=60,
    )
    assert b'"b64_json"' in made.stdout, made.stderr
    page.forget_all()
    chrome.get_log("browser")
