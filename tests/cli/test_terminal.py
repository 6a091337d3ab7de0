"""A picture in the terminal: the right form for each, with the right pixels in it."""

import base64
import io
import re

import pytest
from PIL import Image

from vllm_omni.entrypoints.cli import terminal

RED, BLUE = (255, 0, 0), (0, 0, 255)


class Stream(io.StringIO):
    def __init__(self, tty: bool, encoding: str = "utf-8") -> None:
        super().__init__()
        self.tty, self._encoding = tty, encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return self.tty


@pytest.fixture
def picture() -> Image.Image:
    """Upper half red, lower half blue."""
    image = Image.new("RGB", (4, 4), RED)
    image.paste(BLUE, (0, 2, 4, 4))
    return image


@pytest.mark.parametrize(
    ("tty", "environ", "form"),
    [
        (False, {"COLORTERM": "truecolor"}, terminal.ascii_art),
        (True, {"COLORTERM": "truecolor"}, terminal.half_blocks),
        (True, {"TERM": "xterm-256color"}, terminal.half_blocks_256),
        (True, {"NO_COLOR": "1", "COLORTERM": "truecolor"}, terminal.ascii_art),
        (True, {"TERM": "dumb"}, terminal.ascii_art),
        (True, {"TERM": "xterm-kitty"}, terminal.kitty),
        (True, {"TERM_PROGRAM": "iTerm.app"}, terminal.iterm),
    ],
)
def test_form_by_terminal(tty: bool, environ: dict[str, str], form: object) -> None:
    assert terminal.choose(Stream(tty), environ) is form


def test_a_terminal_without_unicode_gets_ascii() -> None:
    assert terminal.choose(Stream(True, "latin-1"), {"COLORTERM": "truecolor"}) is terminal.ascii_art


def test_half_blocks_hold_two_pixels_each(picture: Image.Image) -> None:
    text = terminal.half_blocks(picture, columns=4, lines=24)
    lines = text.split("\n")
    assert len(lines) == 2
    assert lines[0] == "\x1b[38;2;255;0;0;48;2;255;0;0m\u2580" * 4 + "\x1b[0m"
    assert "48;2;0;0;255m" in lines[1]


def test_palette_colours(picture: Image.Image) -> None:
    assert "38;5;196;48;5;196m" in terminal.half_blocks_256(picture, columns=4, lines=24)


def test_ascii_art_keeps_the_aspect_and_the_brightness() -> None:
    image = Image.new("L", (100, 100), 0)
    image.paste(255, (0, 50, 100, 100))
    lines = terminal.ascii_art(image, columns=40, lines=24).split("\n")
    assert len(lines) == 20
    assert lines[0] == ""
    assert lines[-1] == "@" * 40
    assert terminal.ascii_art(image, 40, 24).isascii()


def test_a_tall_picture_fits_the_screen() -> None:
    text = terminal.half_blocks(Image.new("RGB", (10, 1000)), columns=80, lines=24)
    assert text.count("\n") + 1 <= 24


def test_kitty_sends_the_png_in_chunks(picture: Image.Image) -> None:
    noise = Image.effect_noise((200, 200), 80)
    text = terminal.kitty(noise, columns=80, lines=24)
    chunks = re.findall(r"\x1b_G(.*?);(.*?)\x1b\\", text)
    assert len(chunks) > 1
    assert [head.split(",")[-1] for head, _ in chunks] == ["m=1"] * (len(chunks) - 1) + ["m=0"]
    data = base64.standard_b64decode("".join(chunk for _, chunk in chunks))
    assert Image.open(io.BytesIO(data)).size == (200, 200)


def test_show_writes_to_the_stream(picture: Image.Image) -> None:
    stream = Stream(False)
    terminal.show(picture, stream, {})
    assert stream.getvalue().strip()
