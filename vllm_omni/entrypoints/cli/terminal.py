"""Draws a picture in a terminal.

The best form that the terminal has is taken: the graphics protocols of kitty and iTerm2, half blocks (two pixels a
character) in 24-bit colour or in the 256-colour palette, and plain ASCII where the output is not a terminal.
"""

import base64
import io
import os
import shutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from PIL.Image import Image

HALF_BLOCK = "\u2580"
SHADES = " .:-=+*#%@"
KITTY_CHUNK = 4096
MAX_COLUMNS = 80
ASCII_ASPECT = 0.5
"""Width of a character cell by its height."""


def show(image: "Image", stream: TextIO, environ: Mapping[str, str] = os.environ) -> None:
    """Write ``image`` to ``stream`` in the best form that it takes."""
    size = shutil.get_terminal_size()
    stream.write(choose(stream, environ)(image, min(size.columns, MAX_COLUMNS), size.lines) + "\n")
    stream.flush()


def choose(stream: TextIO, environ: Mapping[str, str]) -> Callable[["Image", int, int], str]:
    """The function that draws for this stream and terminal."""
    if not stream.isatty() or "NO_COLOR" in environ or environ.get("TERM") == "dumb":
        return ascii_art
    if "KITTY_WINDOW_ID" in environ or environ.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        return kitty
    if environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return iterm
    if not (stream.encoding or "").lower().startswith("utf"):
        return ascii_art
    return half_blocks if environ.get("COLORTERM") in ("truecolor", "24bit") else half_blocks_256


def _fit(image: "Image", columns: int, rows: int, cell_aspect: float) -> "Image":
    """Shrink to ``columns`` x ``rows`` pixels at most, for pixels ``cell_aspect`` as wide as high."""
    width, height = image.size
    scale = min(columns / width, rows / (height * cell_aspect))
    return image.convert("RGB").resize((max(1, round(width * scale)), max(1, round(height * scale * cell_aspect))))


def _pixels(image: "Image") -> list[list[tuple[int, int, int]]]:
    width, height = image.size
    data = image.tobytes()
    rows = [data[3 * width * y : 3 * width * (y + 1)] for y in range(height)]
    return [[(row[x], row[x + 1], row[x + 2]) for x in range(0, len(row), 3)] for row in rows]


def ascii_art(image: "Image", columns: int, lines: int) -> str:
    """Brightness as characters; fills the width, since nobody scrolls a file."""
    grey = _fit(image, columns, columns, ASCII_ASPECT).convert("L")
    width, height = grey.size
    data = grey.tobytes()
    ramp = [SHADES[value * (len(SHADES) - 1) // 255] for value in range(256)]
    return "\n".join("".join(ramp[v] for v in data[y * width : (y + 1) * width]).rstrip() for y in range(height))


def half_blocks(image: "Image", columns: int, lines: int) -> str:
    """Two pixels a character: the upper one is the foreground, the lower one the background."""
    return _blocks(image, columns, lines, lambda r, g, b: f"2;{r};{g};{b}")


def half_blocks_256(image: "Image", columns: int, lines: int) -> str:
    """Half blocks in the 6 x 6 x 6 colour cube that every colour terminal has."""
    return _blocks(image, columns, lines, lambda r, g, b: f"5;{16 + 36 * _sixth(r) + 6 * _sixth(g) + _sixth(b)}")


def _sixth(value: int) -> int:
    return (value * 5 + 127) // 255


def _blocks(image: "Image", columns: int, lines: int, colour: Callable[[int, int, int], str]) -> str:
    small = _fit(image, columns, 2 * max(1, lines - 2), 1.0)
    pixels = _pixels(small)
    if len(pixels) % 2:
        pixels.append(pixels[-1])
    out = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = (
            f"\x1b[38;{colour(*top)};48;{colour(*bottom)}m{HALF_BLOCK}"
            for top, bottom in zip(upper, lower, strict=True)
        )
        out.append("".join(cells) + "\x1b[0m")
    return "\n".join(out)


def _png(image: "Image") -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return base64.standard_b64encode(buffer.getvalue()).decode("ascii")


def kitty(image: "Image", columns: int, lines: int) -> str:
    """kitty's graphics protocol: the PNG in chunks, scaled by the terminal to ``columns`` cells."""
    data = _png(image)
    chunks = [data[i : i + KITTY_CHUNK] for i in range(0, len(data), KITTY_CHUNK)]
    out = []
    for index, chunk in enumerate(chunks):
        head = f"a=T,f=100,c={columns // 2}," if index == 0 else ""
        out.append(f"\x1b_G{head}m={int(index < len(chunks) - 1)};{chunk}\x1b\\")
    return "".join(out)


def iterm(image: "Image", columns: int, lines: int) -> str:
    """iTerm2's inline image."""
    return f"\x1b]1337;File=inline=1;width={columns // 2}:{_png(image)}\x07"
