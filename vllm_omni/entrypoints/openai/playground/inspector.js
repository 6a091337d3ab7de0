// Time and request of one answer. There is one inspector; it stands in the answer that it tells of.
import { CodePanel } from "./code.js";
import { button, el } from "./dom.js";
import * as timeline from "./timeline.js";

let parts = null;
let opened = null; // the button that opened it

function build() {
  const times = el("div", { className: "timeline" });
  const timed = el("section", { className: "times" }, el("h3", {}, "Time"), times);
  const code = new CodePanel(el("h3", {}, "Request"));
  return { times, timed, code, element: el("div", { className: "inspector" }, timed, code.element) };
}

function close() {
  opened?.setAttribute("aria-expanded", "false");
  opened = null;
  parts?.element.remove();
}

/** A button for an answer that shows and hides them in `item`. `context` has the stages, and the code of a record. */
export function inspectButton(item, record, context) {
  const made = button("Time and request", () => {
    const same = opened === made;
    close();
    if (same) return;
    parts ??= build();
    parts.timed.hidden = record.metrics === null;
    if (record.metrics !== null) timeline.draw(parts.times, record.metrics, context.stages, record.seen.total, record.seen.first);
    parts.code.show(...context.code(record));
    item.append(parts.element);
    opened = made;
    made.setAttribute("aria-expanded", "true");
    item.scrollIntoView({ block: "nearest" });
  });
  made.className = "quiet";
  made.setAttribute("aria-expanded", "false");
  return made;
}
