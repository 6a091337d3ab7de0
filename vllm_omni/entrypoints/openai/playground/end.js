// The end of the conversation: going there, and staying there while it grows.
import { byId } from "./dom.js";

const UP = 200; // pixels; who goes up so far wants to read there
let following = false; // until the reader does something
let last = 0;

export const atEnd = () => document.documentElement.scrollHeight - innerHeight - scrollY < 80;

/** Go there and stay: what comes into view on the way gets its true height, so the end moves. */
export function toEnd() {
  following = true;
  scrollTo({ top: document.documentElement.scrollHeight });
}

new ResizeObserver(() => following && toEnd()).observe(byId("turns"));
for (const kind of ["wheel", "touchmove", "pointerdown", "keydown"]) {
  addEventListener(kind, () => (following = false), { passive: true, capture: true });
}
addEventListener(
  "scroll",
  () => {
    if (scrollY < last - UP) following = false;
    last = scrollY;
    byId("to-end").hidden = byId("turns").childElementCount === 0 || atEnd();
  },
  { passive: true },
);
byId("to-end").addEventListener("click", toEnd);
