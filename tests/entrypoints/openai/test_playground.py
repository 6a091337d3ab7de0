"""The playground's files, its facts of the model, and what all of it has: keys, names, colours, narrow screens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.entrypoints.openai.browser import resize, scheme
from tests.entrypoints.openai.page import Drawing, Page, Talking
from tests.entrypoints.openai.server import Server, error_of
from vllm_omni.diffusion.models.qwen_image.defaults import QWEN_IMAGE

PATH = "/v1/images/generations"
FOLDER = Path(__file__).parents[3] / "vllm_omni" / "entrypoints" / "openai" / "playground"
LINES = 400

browser_test = pytest.mark.browser


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


def test_files_are_small_and_without_handlers_in_markup() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="ascii")
        assert text.count("\n") <= LINES, path.name
        assert (
            re.search(r"\son\w+\s*=\s*[\"']|innerHTML|outerHTML|insertAdjacentHTML|\beval\(|style=\"", text) is None
        ), path.name


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
    assert info["chat"]["answers"] == ["image"]
    assert set(info["chat"]["parameters"]) == {"num_inference_steps", "true_cfg_scale", "seed"}
    assert "speech" not in info


def test_info_without_tables_of_the_model(pictures: Server) -> None:
    """A stage that tells nothing of itself: the bounds of the endpoint stand, and there are no defaults."""
    image = pictures.http.get("/v1/omni/info").json()["image"]
    words = pictures.process.args
    assert isinstance(words, list)
    most = int(words[words.index("--max-generated-image-size") + 1])
    assert image["parameters"]["guidance_scale"] == {"default": None, "minimum": 0, "maximum": 20}
    assert image["size"] == {"default": [None, None], "multiple": 1, "max_pixels": most}


def test_info_of_a_model_that_speaks(omni_server: Server) -> None:
    info = omni_server.http.get("/v1/omni/info").json()
    assert "image" not in info
    chat, speech = info["chat"], info["speech"]
    assert (chat["answers"], chat["speaks"]) == (["audio", "text"], True)
    assert set(chat["inputs"]) == {"audio", "image", "video"}
    assert chat["voices"] == speech["voices"] != []
    assert chat["max_media_bytes"] == 1_000_000
    assert chat["parameters"]["temperature"] == {"default": 0.0, "minimum": 0, "maximum": 2}
    assert chat["parameters"]["max_completion_tokens"]["default"] == 8
    for name, value in (("temperature", 3), ("top_p", 0), ("max_completion_tokens", 0)):
        body = {"messages": [{"role": "user", "content": "x"}], name: value}
        assert error_of(omni_server.post("/v1/chat/completions", body))["param"] == name
    assert set(speech["parameters"]) == {"input", "instructions", "max_new_tokens", "seed"}


# ---------------------------------------------------------------- everybody can use it


@pytest.fixture
def drawing(tiny: Server, chrome: Chrome) -> Iterator[Drawing]:
    opened = Drawing(chrome, tiny.url, "pictures")
    yield opened
    opened.forget()
    lines = [line["message"] for line in chrome.get_log("browser")]
    assert [line for line in lines if PATH not in line] == []


@pytest.fixture
def talking(omni_server: Server, chrome: Chrome) -> Iterator[Talking]:
    opened = Talking(chrome, omni_server.url, "chat")
    yield opened
    opened.forget()
    assert chrome.get_log("browser") == []


@browser_test
def test_keyboard_and_names(drawing: Drawing) -> None:
    page = drawing
    page.draw("for the keyboard")
    page["prompt"].click()
    reached = []
    for _ in range(40):
        page.press(Keys.TAB)
        focused = page.driver.switch_to.active_element
        if focused.tag_name == "body":
            break
        assert page.run("return getComputedStyle(arguments[0]).outlineStyle", focused) != "none"
        assert focused.accessible_name.strip(), focused.get_attribute("outerHTML")
        reached.append(focused.get_attribute("id") or focused.get_attribute("className"))
    wanted = ["negative_prompt", "width", "height", "num_inference_steps", "seed", "draw", "download", "quiet copy"]
    assert [name for name in reached if name in wanted] == wanted
    page["num_inference_steps"].send_keys(Keys.ARROW_UP)
    assert page["num_inference_steps"].get_attribute("value") == "5"
    page["width"].send_keys(Keys.ARROW_DOWN)
    assert page["width"].get_attribute("value") == "48"
    assert page.run("return document.querySelector('a, button, input, [tabindex]').id") == "skip"  # the first of all
    page["skip"].send_keys(Keys.ENTER)
    assert page.driver.switch_to.active_element == page["prompt"]


@browser_test
def test_modes_by_address_and_keys(drawing: Drawing) -> None:
    page = drawing
    shown = [link.text for link in page.all("#modes a")]
    assert shown == ["Pictures", "Chat"]
    page.all("#modes a")[1].send_keys(Keys.ENTER)
    page.until(page["words"].is_displayed)
    assert not page["prompt"].is_displayed()
    assert page.all("#modes a[aria-current=page]")[0].text == "Chat"
    page.driver.back()
    page.until(page["prompt"].is_displayed)
    assert page.driver.switch_to.active_element == page["prompt"]


def each_colour(page: Page) -> None:
    """No barrier in light nor in dark."""
    for dark in (False, True):
        scheme(page.driver, dark=dark)
        assert page.barriers() == []
    scheme(page.driver, dark=False)


@browser_test
def test_no_barriers_for_pictures(drawing: Drawing) -> None:
    drawing.draw("colours")
    drawing.type(n="99")
    drawing["draw"].click()
    drawing.until(drawing.invalid)
    each_colour(drawing)


@browser_test
def test_no_barriers_for_talk(talking: Talking) -> None:
    assert talking.barriers() == []  # the empty page
    talking.ask("what is it")
    talking.inspect()
    each_colour(talking)
    talking.open("speech")
    talking["input"].send_keys("what is it", Keys.CONTROL, Keys.ENTER)
    talking.until(lambda: talking.all("#clips .sound"))
    talking.inspect()
    each_colour(talking)


@browser_test
def test_dark_and_light(drawing: Drawing) -> None:
    page = drawing

    def background() -> int:
        colour = page.run("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    assert background() > 600
    scheme(page.driver, dark=True)
    assert background() < 150
    page.all("#theme input[value=light]")[0].find_element(By.XPATH, "..").click()
    assert background() > 600
    page.driver.refresh()
    page.until(page["width"].is_displayed)
    assert background() > 600


@browser_test
@pytest.mark.parametrize("width", [320, 360])
def test_phone(drawing: Drawing, width: int) -> None:
    resize(drawing.driver, width, 700)
    drawing.draw("w" * 90, (256, 64), num_inference_steps="0004")
    assert drawing.overflow() == []


@browser_test
def test_phone_talks(talking: Talking) -> None:
    resize(talking.driver, 360, 700)
    for mode in ("chat", "speech"):
        talking.open(mode)
        assert talking.overflow() == []
    talking.open("chat")
    assert not talking["voice"].is_displayed()  # settings are folded away
    talking["words"].send_keys("w" * 90)
    talking["send"].click()
    talking.until(lambda: talking.all("#turns .theirs:not([aria-busy])"))
    talking.inspect()
    assert talking.overflow() == []
    talking.all(".settings > summary")[0].click()
    talking.until(talking["voice"].is_displayed)
    assert talking.overflow() == []


# ---------------------------------------------------------------- nothing leaves the server


@browser_test
def test_nothing_leaves_the_origin(drawing: Drawing, tiny: Server) -> None:
    page = drawing
    page.draw("at home")
    names = page.run("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert len(names) >= 8
    assert [name for name in names if not name.startswith((tiny.url + "/", f"blob:{tiny.url}/"))] == []
    refused = page.later(
        """const done = arguments[0];
        addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
        fetch("http://127.0.0.1:9/").catch(() => {});"""
    )
    assert refused == "connect-src"
    assert page.run("try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name }") == "TypeError"
    page.driver.get_log("browser")  # the violations that were provoked


@browser_test
def test_key(pictures: Server, chrome: Chrome) -> None:
    page = Page(chrome, pictures.url, None)
    page.until(page["key"].is_displayed)
    assert not page["pictures"].is_displayed()
    page["key"].send_keys("wrong", Keys.ENTER)
    page.until(lambda: page["notice"].text == "the API key is missing or wrong")
    page.type(key=pictures.api_key)
    page["key"].send_keys(Keys.ENTER)
    page.until(page["pictures"].is_displayed)
    assert pictures.api_key not in page.code("python")
    assert '"Authorization: Bearer $VLLM_API_KEY"' in page.code("curl")
    assert 'os.environ["VLLM_API_KEY"]' in page.code("python")
    page.forget()
    chrome.get_log("browser")
