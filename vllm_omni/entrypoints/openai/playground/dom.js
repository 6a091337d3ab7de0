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

/** Seconds as people read them. */
export function seconds(value) {
  if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 100) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

/** Say something to those who listen instead of looking. */
export function announce(text) {
  byId("live").textContent = text;
}

/** Put text on the clipboard; also where the page has no secure context, so no clipboard of its own. */
export async function copyText(text, source) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const range = document.createRange();
  range.selectNodeContents(source);
  const selection = getSelection();
  selection.removeAllRanges();
  selection.addRange(range);
  if (!document.execCommand("copy")) throw new Error("the browser refused to copy");
  selection.removeAllRanges();
}
