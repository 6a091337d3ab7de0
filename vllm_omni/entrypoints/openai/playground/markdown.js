// The small part of Markdown that models write, as elements. Text stays text: there is no HTML in it, and nothing is loaded.
import { el } from "./dom.js";

const FENCE = /^\s{0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const DIVIDER = /^\s*\|?(\s*:?-+:?\s*\|)+\s*:?-*:?\s*\|?\s*$/;
const LINK = /^(https?:\/\/|mailto:)/i;
const MARKS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];
const LETTER = /[\p{L}\p{N}]/u;
const DEPTH = 8;

/** The elements of a text. */
export function render(text) {
  return blocks(text.replaceAll("\r\n", "\n").split("\n"), 0);
}

function blocks(lines, depth) {
  const made = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const next = [fenced, heading, rule, quote, list, table].reduce((found, kind) => found ?? kind(lines, at, depth), null);
    if (next !== null) {
      made.push(next.element);
      at = next.at;
    } else if (line.trim() === "") {
      at += 1;
    } else {
      const from = at;
      do at += 1;
      while (at < lines.length && lines[at].trim() !== "" && !begins(lines[at]));
      made.push(el("p", {}, ...inline(lines.slice(from, at).join("\n"), depth)));
    }
  }
  return made;
}

const begins = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || ITEM.test(line) || line.startsWith(">");

function fenced(lines, at) {
  const [, fence, language] = FENCE.exec(lines[at]) ?? [];
  if (fence === undefined) return null;
  let to = at + 1;
  while (to < lines.length && !lines[to].trim().startsWith(fence)) to += 1;
  const code = el("code", {}, lines.slice(at + 1, to).join("\n"));
  const pre = el("pre", { tabIndex: 0, "aria-label": language ? `Code, ${language}` : "Code" }, code);
  return { element: pre, at: to + 1 };
}

function heading(lines, at, depth) {
  const [, marks, text] = HEADING.exec(lines[at]) ?? [];
  if (marks === undefined) return null;
  // Below the headings of the page.
  return { element: el(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(text, depth)), at: at + 1 };
}

const rule = (lines, at) => (RULE.test(lines[at]) ? { element: el("hr"), at: at + 1 } : null);

function quote(lines, at, depth) {
  if (!lines[at].startsWith(">") || depth >= DEPTH) return null;
  let to = at;
  while (to < lines.length && lines[to].startsWith(">")) to += 1;
  const inside = lines.slice(at, to).map((line) => line.replace(/^> ?/, ""));
  return { element: el("blockquote", {}, ...blocks(inside, depth + 1)), at: to };
}

function list(lines, at, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]) ?? [];
  if (indent === undefined || depth >= DEPTH) return null;
  const ordered = /\d/.test(mark);
  const items = [];
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (item === null || item[1].length > indent.length + 1 || /\d/.test(item[2]) !== ordered) break;
    const inside = [item[3]];
    at += 1;
    while (at < lines.length && /^\s+\S/.test(lines[at]) && lines[at].search(/\S/) > indent.length + 1) inside.push(lines[at++].slice(indent.length + 2));
    items.push(inside);
    if (lines[at]?.trim() === "" && ITEM.test(lines[at + 1] ?? "")) at += 1; // a loose list
  }
  const element = el(ordered ? "ol" : "ul", ordered ? { start: Number.parseInt(mark, 10) } : {});
  element.append(...items.map((inside) => el("li", {}, ...tight(inside, depth))));
  return { element, at };
}

function tight([first, ...rest], depth) {
  return [...inline(first, depth), ...blocks(rest, depth + 1)];
}

function table(lines, at, depth) {
  if (!lines[at].includes("|") || !DIVIDER.test(lines[at + 1] ?? "")) return null;
  let to = at + 2;
  while (to < lines.length && lines[to].includes("|")) to += 1;
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const row = (line, kind) => el("tr", {}, ...cells(line).map((cell) => el(kind, {}, ...inline(cell.trim(), depth))));
  const body = lines.slice(at + 2, to).map((line) => row(line, "td"));
  const whole = el("table", {}, el("thead", {}, row(lines[at], "th")), el("tbody", {}, ...body));
  return { element: el("div", { className: "wide", tabIndex: 0, role: "region", "aria-label": "Table" }, whole), at: to };
}

/** Text and elements of a line. Each mark's end is looked for once only: hostile text costs no more than other text. */
function inline(text, depth) {
  const made = [];
  const ends = new Map(); // mark -> where it stands next; Infinity: nowhere any more
  let plain = "";
  let at = 0;
  const put = (element, to) => {
    if (plain) made.push(plain);
    plain = "";
    made.push(element);
    at = to;
  };
  const closing = (mark, from) => {
    if (!(ends.get(mark) >= from)) {
      const found = text.indexOf(mark, from);
      ends.set(mark, found < 0 ? Infinity : found);
    }
    return ends.get(mark);
  };
  while (at < text.length) {
    const letter = text[at];
    if (letter === "\\" && /[\\`*_{}[\]()#+.!~>|-]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    if (letter === "`") {
      const to = closing("`", at + 1);
      if (to > at + 1 && to < Infinity) {
        put(el("code", {}, text.slice(at + 1, to)), to + 1);
        continue;
      }
    }
    const found = depth < DEPTH ? (marked(text, at, closing, depth) ?? linked(text, at, closing, depth)) : null;
    if (found !== null) {
      put(found.element, found.at);
      continue;
    }
    plain += letter;
    at += 1;
  }
  if (plain) made.push(plain);
  return made;
}

function marked(text, at, closing, depth) {
  for (const [mark, tag] of MARKS) {
    if (!text.startsWith(mark, at)) continue;
    const from = at + mark.length;
    if (/\s/.test(text[from] ?? " ")) return null;
    if (mark[0] === "_" && LETTER.test(text[at - 1] ?? " ")) return null; // snake_case
    const to = closing(mark, from + 1);
    if (to === Infinity || /\s/.test(text[to - 1])) continue;
    return { element: el(tag, {}, ...inline(text.slice(from, to), depth + 1)), at: to + mark.length };
  }
  return null;
}

function linked(text, at, closing, depth) {
  if (text[at] === "[" || (text[at] === "!" && text[at + 1] === "[")) {
    const from = at + (text[at] === "!" ? 2 : 1);
    const middle = closing("](", from);
    const to = middle < Infinity ? closing(")", middle) : Infinity;
    const url = to === Infinity || to - middle > 4096 ? "" : text.slice(middle + 2, to).split(/\s/)[0];
    if (LINK.test(url)) return { element: link(url, inline(text.slice(from, middle), depth + 1)), at: to + 1 };
  }
  if (text[at] === "h" && /^https?:\/\//.test(text.slice(at, at + 8))) {
    const [url] = /^[^\s<>"'`]+/.exec(text.slice(at, at + 2048));
    const short = url.replace(/[.,;:!?)\]*_~]+$/, "");
    return { element: link(short, [short]), at: at + short.length };
  }
  return null;
}

const link = (href, children) => el("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);

/** Shows a text that grows. What stands before the last empty line is made into elements once. */
export class Writer {
  constructor(target) {
    this.target = target;
    this.text = "";
    this.settled = 0; // characters that will not be looked at again
    this.fixed = 0; // elements of these
    this.frame = null;
  }

  add(piece, then) {
    this.text += piece;
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.show();
      then();
    });
  }

  show() {
    const open = this.text.slice(this.settled);
    const cut = boundary(open);
    while (this.target.childNodes.length > this.fixed) this.target.lastChild.remove();
    if (cut > 0) {
      this.target.append(...render(open.slice(0, cut)));
      this.fixed = this.target.childNodes.length;
      this.settled += cut;
    }
    this.target.append(...render(open.slice(cut)));
  }

  /** All of it has come. */
  end() {
    cancelAnimationFrame(this.frame);
    this.target.replaceChildren(...render(this.text));
  }
}

/** Where the last block begins; 0 when there is one only. A fence is one block. */
function boundary(text) {
  let [offset, cut, fence] = [0, 0, ""];
  for (const line of text.split("\n")) {
    const [, mark] = FENCE.exec(line) ?? [];
    if (fence ? line.trim().startsWith(fence) : mark !== undefined) fence = fence ? "" : mark;
    offset += line.length + 1;
    if (!fence && line.trim() === "" && offset <= text.length) cut = offset;
  }
  return cut;
}
