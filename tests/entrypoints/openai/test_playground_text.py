"""What models write, as the playground shows it: a small Markdown without markup in it; long chats."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome

from tests.entrypoints.openai.page import Drawing, Talking
from tests.entrypoints.openai.server import Server

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tiny: Server, chrome: Chrome) -> Iterator[Drawing]:
    opened = Drawing(chrome, tiny.url, "pictures")
    chrome.get_log("browser")
    yield opened
    assert chrome.get_log("browser") == []  # nothing was loaded, nothing ran


RENDER = """const [text, done] = arguments;
import("/playground/markdown.js").then(({render}) => {
  const place = document.createElement("div");
  const begun = performance.now();
  place.append(...render(text));
  done([place.innerHTML, performance.now() - begun, place.textContent]);
});"""


def shown(page: Drawing, text: str) -> str:
    """The elements of a text."""
    return str(page.later(RENDER, text)[0])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
        ("a **bold** and *soft* `code *x*`", "<p>a <strong>bold</strong> and <em>soft</em> <code>code *x*</code></p>"),
        ("2 * 3 * 4, snake_case_name, a ** b", "<p>2 * 3 * 4, snake_case_name, a ** b</p>"),
        (r"\*not\* this", "<p>*not* this</p>"),
        ("## Head ##\ntext", "<h4>Head</h4><p>text</p>"),
        ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
        ("3. a\n\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("> a\n> b", "<blockquote><p>a\nb</p></blockquote>"),
        ("a\n\n---\nb", "<p>a</p><hr><p>b</p>"),
    ],
)
def test_markdown(page: Drawing, text: str, wanted: str) -> None:
    assert shown(page, text) == wanted


def test_blocks_that_scroll_have_names(page: Drawing) -> None:
    made = shown(page, "```python\nprint('*x*')\n\n# y\n```\n| a | b |\n|---|---|\n| 1 | **2** |")
    assert '<pre tabindex="0" aria-label="Code, python"><code>print(\'*x*\')\n\n# y</code></pre>' in made
    assert "<tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td><strong>2</strong></td></tr>" in made


LINK = '<a href="{}" target="_blank" rel="noopener noreferrer nofollow">{}</a>'


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[x](https://a.example/b)", LINK.format("https://a.example/b", "x")),
        ("see https://a.example/b.", "see " + LINK.format("https://a.example/b", "https://a.example/b") + "."),
        ("![x](https://a.example/b.png)", LINK.format("https://a.example/b.png", "x")),  # loaded by nobody
        ("[x](javascript:alert(1))", "[x](javascript:alert(1))"),
        ("[x](data:text/html,<b>)", "[x](data:text/html,&lt;b&gt;)"),
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        (
            '[<b>](https://a.example/"onmouseover=x)',
            LINK.format("https://a.example/&quot;onmouseover=x", "&lt;b&gt;"),
        ),
    ],
)
def test_nothing_in_a_text_is_markup(page: Drawing, text: str, wanted: str) -> None:
    assert shown(page, text) == f"<p>{wanted}</p>"


@pytest.mark.parametrize("piece", ["*a ", "**", "[", "](", "`", "_a", "> ", "- a\n ", "| - ", "# *[`_~", "~~ ", "\\"])
def test_hostile_text_costs_no_more_than_other_text(page: Drawing, piece: str) -> None:
    page.later(RENDER, piece * 1000)
    few, many = (page.later(RENDER, piece * (count // len(piece)))[1] for count in (20_000, 200_000))
    assert many < 40 * max(few, 20), (few, many)  # milliseconds; ten times the text, and not a hundred times the work


GROWS = """const [text, done] = arguments;
import("/playground/markdown.js").then(async ({Writer, render}) => {
  const [place, whole] = [document.createElement("div"), document.createElement("div")];
  whole.append(...render(text));
  let made = 0;
  const watch = new MutationObserver((all) => all.forEach((one) => made += one.addedNodes.length));
  watch.observe(place, {childList: true});
  const writer = new Writer(place);
  const between = [];
  for (let at = 0; at < text.length; at += 7) {
    writer.text += text.slice(at, at + 7);
    writer.show();
    await null;
    between.push(place.textContent.length);
  }
  const last = place.innerHTML;
  writer.end();
  const grows = between.every((size, i) => i === 0 || size >= between[i - 1] - 8);
  done([last, place.innerHTML, whole.innerHTML, made, grows]);
});"""


def test_a_text_that_grows(page: Drawing) -> None:
    """Paragraphs that are finished are not made again; the end is as if it had come at once."""
    block = "A **bold** paragraph of some words.\n\n```\ncode\n\nwith a gap\n```\n\n"
    last, ended, whole, made, grows = page.later(GROWS, block * 40)
    assert last == ended == whole
    assert grows
    pieces = len(block * 40) // 7
    assert made < 4 * pieces  # not blocks times pieces


# ---------------------------------------------------------------- long chats

LONG = """const done = arguments[0];
import("/playground/store.js").then(async (store) => {
  const text = "An answer with **bold** words, `code`, and a list:\\n\\n- one\\n- two\\n\\nand an end.";
  const one = (i) => ({
    id: `turn-${i}`, at: i, model: "tiny", words: `question ${i}`, files: [], pictures: [], text, thoughts: "",
    rate: 24000, metrics: null, tokens: 9, settings: {system: "", options: {}}, stopped: false,
    sound: new Int16Array(12000).fill(i), seen: {first: .1, word: .1, sound: .2, total: 1},
  });
  await Promise.all(Array.from({length: 500}, (_, i) => store.keep("turns", one(i))));
}).then(() => done(null), (error) => done(String(error)));"""


ANSWER = """window.elsewhere = 0;
const known = new Set(turns.children);
new MutationObserver((all) => {
  for (const one of all) if (known.has(one.target.closest?.("#turns > li"))) window.elsewhere += 1;
}).observe(turns, {childList: true, subtree: true, characterData: true, attributes: true});
window.fetch = async () => {
  const stream = new ReadableStream({
    async start(to) {
      for (let i = 0; i < 200; i++) {
        const choices = [{index: 0, delta: {content: `word ${i} `}, finish_reason: null}];
        to.enqueue(new TextEncoder().encode(`data: ${JSON.stringify({choices})}\\n\\n`));
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
      to.close();
    },
  });
  return new Response(stream);
};"""
LAID_OUT = "return [...turns.children].filter((e) => e.lastChild.checkVisibility({contentVisibilityAuto: true})).length"


@pytest.fixture
def chat(tiny: Server, chrome: Chrome) -> Iterator[Talking]:
    opened = Talking(chrome, tiny.url, "chat")
    yield opened
    opened.forget()
    assert chrome.get_log("browser") == []


def test_a_thousand_messages_stay_smooth(chat: Talking) -> None:
    page = chat
    assert page.later(LONG) is None
    page.open("chat")
    page.until(lambda: page.run("return turns.children.length") == 1000)
    page.until(lambda: page.run("return innerHeight + scrollY >= document.documentElement.scrollHeight - 2"))
    page.until(lambda: page.all("#turns .sound canvas"))
    assert page.run("return turns.querySelectorAll('canvas').length") < 50  # only what is near has a player
    assert page.run(LAID_OUT) < 100
    first = page.run("return turns.querySelectorAll('.sound').length")
    page.run("scrollTo(0, document.documentElement.scrollHeight / 2)")
    page.until(lambda: page.run("return turns.querySelectorAll('.sound').length") > first)  # and there it comes
    assert page.run("return turns.querySelectorAll('canvas').length") < 100
    assert page.run(LAID_OUT) < 100
    page["to-end"].click()
    page.run(ANSWER)
    page.ask("one more")
    assert page.answers()[-1].strip().endswith("word 199")
    assert page.run("return window.elsewhere") < 20  # the answer's two hundred pieces touch the answer alone
    page["new-chat"].click()
    page.until(lambda: page["welcome"].is_displayed())
