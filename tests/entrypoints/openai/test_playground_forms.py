"""Edits and videos in the playground: what goes along with a prompt, jobs, players; in a real browser."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys

from tests.entrypoints.openai.browser import resize, scheme
from tests.entrypoints.openai.page import Drawing, Page, Talking, run_code
from tests.entrypoints.openai.server import Server
from tests.entrypoints.openai.test_edits_and_videos import frames, png

pytestmark = pytest.mark.browser
CORNER = """const [element, width, height] = arguments;
const canvas = new OffscreenCanvas(width, height);
const pen = canvas.getContext("2d");
pen.drawImage(element, 0, 0);
return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);"""


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    (tmp_path / "photo.png").write_bytes(png())
    return tmp_path / "photo.png"


@pytest.fixture
def editing(editor: Server, chrome: Chrome) -> Iterator[Drawing]:
    opened = Drawing(chrome, editor.url, "pictures")
    yield opened
    opened.forget()
    lines = [line["message"] for line in chrome.get_log("browser")]
    assert [line for line in lines if "/v1/images/edits" not in line] == []


@pytest.fixture
def filming(films: Server, chrome: Chrome) -> Iterator[Page]:
    opened = Page(chrome, films.url, "videos")
    yield opened
    opened.forget()
    lines = [line["message"] for line in chrome.get_log("browser")]
    assert [line for line in lines if "/v1/videos" not in line] == []


def take(page: Page, field: str, path: Path) -> None:
    """Choose a file."""
    before = len(page.all(".sources li"))
    page[f"{field}-files"].send_keys(str(path))
    page.until(lambda: len(page.all(".sources li")) == before + 1)


def corner(page: Page, element: Any) -> tuple[int, ...]:
    """The colour in the corner of a shown picture."""
    page.until(lambda: page.run("return arguments[0].complete", element))
    return tuple(page.run(CORNER, element, 48, 32))


def everybody_can_use(page: Page) -> None:
    """No barriers in either colours, nothing beside the page at phone width."""
    for dark in (False, True):
        scheme(page.driver, dark)
        assert page.barriers() == []
    for width in (390, 320):
        resize(page.driver, width, 700)
        assert page.overflow() == []


# ---------------------------------------------------------------- edits


def test_a_picture_is_changed(editing: Drawing, photo: Path, tmp_path: Path) -> None:
    """What is uploaded is changed, the code does the same, and the history has it all."""
    page = editing
    take(page, "image", photo)
    page.type(prompt="as a 'negative' @home")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.kept() == 1 and page["caption"].is_displayed())
    assert corner(page, page.all("#canvas img")[0]) == (245, 155, 55)
    assert page.facts()["size"] == "48x32"  # its own
    assert page.all("#from img")[0].get_attribute("alt") == "photo.png"
    assert "0 Invert: " in str(page.all("#timeline .track")[0].get_attribute("aria-label"))
    for language in ("curl", "python"):
        folder = tmp_path / language
        folder.mkdir()
        (folder / "photo.png").write_bytes(photo.read_bytes())
        run_code(page, folder, language)
        assert Image.open(folder / "picture-0.png").getpixel((0, 0)) == (245, 155, 55)
    everybody_can_use(page)
    resize(page.driver, 1280, 900)
    page.open("pictures")
    page.until(lambda: page.kept() == 1)
    assert not page.all(".sources li")
    page["again"].click()
    assert [item.text.split("\n")[0] for item in page.all(".sources li")] == ["photo.png"]
    page["change"].click()  # the negative of the negative
    page.until(lambda: [item.text.split("\n")[0] for item in page.all(".sources li")] == ["picture-0.png"])
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.kept() == 2)
    assert corner(page, page.all("#canvas img")[0]) == (10, 100, 200)


def test_what_cannot_be_changed(editing: Drawing, tmp_path: Path) -> None:
    """Said beside the field: no picture at all, by the page; a broken or a large one, by the server."""
    page = editing
    (tmp_path / "words.txt").write_text("words")
    page["image-files"].send_keys(str(tmp_path / "words.txt"))
    page.until(lambda: page["image-error"].text)
    assert "words.txt: editor reads pictures" in page["image-error"].text
    page.type(prompt="x")
    for name, data, said in (("a.png", b"no picture", "no picture of"), ("b.png", png(size=(200, 200)), "pixels")):
        (tmp_path / name).write_bytes(data)
        take(page, "image", tmp_path / name)
        page["prompt"].send_keys(Keys.CONTROL, Keys.ENTER)
        page.until(lambda said=said: said in page["image-error"].text)
        assert page["prompt"].get_attribute("value") == "x"
        page.all(".sources li button")[0].click()
        assert not page.all(".sources li")
    assert (page["width"].get_attribute("value"), page.kept()) == ("1024", 0)


DROP = """const [kind, data] = arguments;
const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
const files = new DataTransfer();
files.items.add(new File([bytes], `${kind}.png`, {type: "image/png"}));
const event = kind === "drop" ? new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true})
  : new ClipboardEvent("paste", {clipboardData: files, bubbles: true, cancelable: true});
document.getElementById("prompt").dispatchEvent(event);"""


def test_dropped_and_pasted(editing: Drawing) -> None:
    """Several pictures go along, one each way, and both are read."""
    page = editing
    for kind, colour in (("drop", (0, 0, 0)), ("paste", (100, 100, 100))):
        page.run(DROP, kind, base64.b64encode(png(colour)).decode())
    page.until(lambda: len(page.all(".sources li")) == 2)
    page.type(prompt="both")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.kept() == 1)
    assert corner(page, page.all("#canvas img")[0]) == (205, 205, 205)
    assert "image[]=@paste.png" in page.code("curl")


def test_models_that_cannot(tiny: Server, chrome: Chrome) -> None:
    info = tiny.http.get("/v1/omni/info").json()
    assert (info["image"]["inputs"], "video" in info) == ({}, False)
    page = Drawing(chrome, tiny.url, "pictures")
    assert not page.all(".sources")[0].is_displayed()
    assert not page["change"].is_displayed()
    assert [link.text for link in page.all("#modes a")] == ["Pictures", "Chat"]


# ---------------------------------------------------------------- videos


def test_a_video(filming: Page, films: Server, photo: Path, tmp_path: Path, downloads: Path) -> None:
    """From a picture: it is filmed, played, saved, kept over a reload; the code makes the same."""
    page = filming
    take(page, "input_reference", photo)
    page.type(video__prompt="a film", video__seconds="0.5", video__size="64x48", video__fps="10")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.all("#films video"))
    (video,) = page.all("#films video")
    page.until(lambda: page.run("return arguments[0].readyState >= 2", video))
    shape = page.run("const [v] = arguments; return [v.videoWidth, v.videoHeight, v.duration]", video)
    assert shape == [64, 48, pytest.approx(0.5, abs=0.02)]
    assert "64x48 \u00b7 5 frames, 10 a second" in page.all(".film .num")[0].text
    page.all(".film .foot button")[0].click()
    saved = downloads / "a-film.mp4"
    page.until(saved.exists)
    made, rate = frames(saved.read_bytes())
    assert (len(made), rate, made[0].shape) == (5, 10, (48, 64, 3))
    page.all(".film [aria-expanded]")[0].click()
    assert "0 VideoStage: " in str(page.all(".film .track")[0].get_attribute("aria-label"))
    for language in ("curl", "python"):
        folder = tmp_path / language
        folder.mkdir()
        (folder / "photo.png").write_bytes(photo.read_bytes())
        run_code(page, folder, language)
        again, _ = frames((folder / "video.mp4").read_bytes())
        assert [int(frame.mean()) for frame in again] == [int(frame.mean()) for frame in made]
    everybody_can_use(page)
    page.open("videos")
    page.until(lambda: page.all("#films video"))
    page.all(".film .foot button")[1].click()
    filled = [page[f"video-{name}"].get_attribute("value") for name in ("prompt", "seconds", "size", "fps")]
    assert filled == ["a film", "0.5", "64x48", "10"]
    assert [item.text.split("\n")[0] for item in page.all(".sources li")] == ["photo.png"]
    page["clear-films"].click()
    page.all("#sure button[value=yes]")[0].click()
    page.until(page["no-films"].is_displayed)


def test_a_job_goes_on_without_the_page(filming: Page, films: Server) -> None:
    """Its progress is shown, also when the page comes back; Escape ends it on the server."""
    page = filming
    page.type(video__prompt="hang")
    page.press(Keys.CONTROL, Keys.ENTER)
    for _ in range(2):
        page.until(lambda: page.all("#films .meter[aria-valuenow='30']"))
        page.open("videos")
    page.until(lambda: page.all("#films .meter[aria-valuenow='30']"))
    assert films.http.get("/health").json()["open_requests"] == 1
    page["video-prompt"].send_keys(Keys.ESCAPE)
    page.until(lambda: films.http.get("/health").json()["open_requests"] == 0)
    page.until(page["no-films"].is_displayed)


def test_videos_that_fail(filming: Page) -> None:
    page = filming
    page.type(video__prompt="fail")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.all("#films .error"))
    assert page.all("#films .error")[0].text == "no room"
    page.type(video__prompt="x", video__seconds="1", video__num_frames="3")
    page["film"].click()
    page.until(lambda: page["video-seconds-error"].text)
    assert page["video-seconds-error"].text == "seconds: given beside num_frames"
    assert page.driver.switch_to.active_element == page["video-seconds"]
    page.type(video__seconds="", video__num_frames="9999")
    page["film"].click()
    page.until(lambda: "4096" in page["video-num_frames-error"].text)


# ---------------------------------------------------------------- chats


def test_a_picture_is_changed_by_a_chat(editor: Server, chrome: Chrome, photo: Path, tmp_path: Path) -> None:
    """A model that reads pictures takes them beside a message; the shown code does the same."""
    page = Talking(chrome, editor.url, "chat")
    try:
        page.attach(photo)
        page.ask("a negative")
        (image,) = page.until(lambda: page.all("#turns .theirs img"))
        assert corner(page, image) == (245, 155, 55)
        page.inspect()
        for language in ("curl", "python"):
            folder = tmp_path / language
            folder.mkdir()
            (folder / "photo.png").write_bytes(photo.read_bytes())
            run_code(page, folder, language)
            with Image.open(folder / "picture-0.png") as made:
                assert made.getpixel((0, 0)) == (245, 155, 55)
    finally:
        page.forget()
