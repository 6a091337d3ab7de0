// A request as code, with a choice of languages, a button that copies, and the files that the code reads.
import { button, copyWith, el, icon, saveAs } from "./dom.js";

const LANGUAGES = { curl: "curl", python: "Python" };
const PATTERNS = {
  curl: /("(?:[^"\\\n]|\\.)*")|\b(curl|base64|python3)\b/g,
  python: /("(?:[^"\\\n]|\\.)*")|\b(import|from|with|as|for|in|if|def|return|print|open)\b/g,
};
const KINDS = ["string", "word"];
const panels = new Set();
let language = localStorage.getItem("omni.language") === "python" ? "python" : "curl";

export class CodePanel {
  /** `title` is the element that names the panel. */
  constructor(title) {
    this.write = null;
    this.choices = Object.entries(LANGUAGES).map(([key, name]) => {
      const choice = button(name, () => choose(key));
      choice.dataset.language = key;
      return choice;
    });
    this.copy = button("Copy", () => copyWith(this.copy, this.text.textContent), { className: "quiet copy" }, icon("copy"));
    this.text = el("pre", { tabIndex: 0, role: "region", "aria-label": "The request as code" });
    this.files = el("p", { className: "hint files" });
    const languages = el("div", { className: "switch", role: "group", "aria-label": "Language" }, ...this.choices);
    this.element = el("section", { className: "code" }, el("div", { className: "code-head" }, title, languages, this.copy), this.text, this.files);
    panels.add(this);
  }

  /** Show a request: `write[language]()` gives its code, `files` are those that the code reads, [name, blob]. */
  show(write, files = []) {
    this.write = write;
    this.draw();
    this.files.hidden = files.length === 0;
    const links = files.flatMap(([name, blob]) => [" ", button(name, () => saveAs(blob(), name), { className: "link" })]);
    this.files.replaceChildren(`Reads from the folder where it runs:`, ...links);
  }

  draw() {
    if (this.write === null) return;
    this.text.replaceChildren(...coloured(this.write[language](), PATTERNS[language]));
    for (const choice of this.choices) choice.setAttribute("aria-pressed", String(choice.dataset.language === language));
  }
}

function choose(key) {
  language = key;
  localStorage.setItem("omni.language", key);
  for (const panel of panels) panel.draw();
}

function coloured(text, pattern) {
  if (text.length > 20000) return [text];
  const made = [];
  let at = 0;
  for (const found of text.matchAll(pattern)) {
    const kind = KINDS[found.slice(1).findIndex((part) => part !== undefined)];
    made.push(text.slice(at, found.index), el("span", { className: kind }, found[0]));
    at = found.index + found[0].length;
  }
  return [...made, text.slice(at)];
}
