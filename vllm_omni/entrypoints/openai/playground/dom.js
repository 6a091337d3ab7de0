// Small helpers of the page. Text is always set as text: nothing here parses markup.

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** A new element: its properties, then its children (elements or text). */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** One of the drawings in the head of the page, for those who see; a name stands beside it. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button; `click` is called when it is pressed. */
export function button(text, click, properties = {}, ...before) {
  const made = el("button", { type: "button", ...properties }, ...before, text);
  made.addEventListener("click", click);
  return made;
}

/** Seconds as people read them. */
export function seconds(value) {
  if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 100) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

/** Minutes and seconds, as on a clock. */
export const clock = (value) => `${Math.floor(value / 60)}:${String(Math.floor(value % 60)).padStart(2, "0")}`;

/** Say something to those who listen instead of looking. */
export function announce(text) {
  byId("live").textContent = text;
}

/** Put text on the clipboard; also where the page has no secure context, so no clipboard of its own. */
export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const carrier = el("textarea", { value: text, className: "hidden" });
  document.body.append(carrier);
  carrier.select();
  const done = document.execCommand("copy");
  carrier.remove();
  if (!done) throw new Error("the browser refused to copy");
}

/** Copy, and say on the button that it is done. */
export async function copyWith(pressed, text) {
  const label = pressed.lastChild;
  const before = pressed.dataset.label ?? label.textContent;
  pressed.dataset.label = before;
  let said = "Copied";
  try {
    await copyText(text);
  } catch {
    said = "Not copied: select it and press Ctrl + C";
  }
  label.textContent = said;
  announce(said);
  setTimeout(() => (label.textContent = before), 1600);
}

/** Save bytes as a file. */
export function saveAs(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60000); // the browser may still be writing
}

/** Ask before something is lost; true when it may be. */
export function sure(text) {
  const dialog = byId("sure");
  byId("sure-text").textContent = text;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

/** Whether Enter alone should send: not where it is a key of a screen's keyboard, and not while a word is composed. */
export const sends = (event) =>
  event.key === "Enter" &&
  !event.isComposing &&
  (event.ctrlKey || event.metaKey || (!event.shiftKey && !matchMedia("(pointer: coarse)").matches));

const near = new IntersectionObserver(
  (entries) => {
    for (const { target } of entries.filter((one) => one.isIntersecting)) {
      near.unobserve(target);
      target.fill();
    }
  },
  { rootMargin: "600px" },
);

/** Call `fill` once, when the element is about to be seen. */
export function whenNear(element, fill) {
  element.fill = fill;
  near.observe(element);
}
