// Fields of forms: numbers with keys and sliders, what the server says of them, and what was last in them.
import { el } from "./dom.js";

const WHOLE = new Set(["num_inference_steps", "n", "seed", "max_completion_tokens", "max_new_tokens", "num_frames", "fps"]);
const NUMBER = /^-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

/** Give a field a value as if it had been typed. */
export function set(input, value) {
  input.value = value;
  input.dispatchEvent(new Event("input", { bubbles: true }));
}

/** A typed value: a number where it is one, else the text itself, for the server to say what is wrong with it. */
export function typed(text) {
  const trimmed = text.trim();
  if (!NUMBER.test(trimmed)) return trimmed;
  const value = Number(trimmed);
  return /^-?\d+$/.test(trimmed) && !Number.isSafeInteger(value) ? BigInt(trimmed) : value;
}

/** A field for the parameter `key`; `facts` are its default and bounds. */
export function numberField(key, label, facts, { hint = "", slider = true, id = key } = {}) {
  const { default: initial, maximum } = facts;
  const minimum = facts.minimum ?? facts.exclusiveMinimum;
  const step = WHOLE.has(key) ? 1 : facts.maximum <= 1 ? 0.05 : 0.1;
  const input = el("input", { id, inputMode: step === 1 ? "numeric" : "decimal", autocomplete: "off" });
  input.spellcheck = false;
  input.dataset.initial = initial ?? "";
  input.value = input.dataset.initial;
  const range = slider && input.value !== "" && minimum !== undefined && maximum !== undefined ? rangeOf(input, minimum, maximum, step) : null;
  input.addEventListener("keydown", (event) => {
    const sign = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (sign === undefined) return;
    event.preventDefault();
    const next = (Number(input.value) || 0) + sign * step * (event.shiftKey ? 10 : 1);
    set(input, Number(Math.min(Math.max(next, minimum ?? -Infinity), maximum ?? Infinity).toFixed(4)));
  });
  const note = hint ? el("p", { className: "hint" }, hint) : null;
  const error = el("p", { className: "error", id: `${id}-error` });
  const field = el("div", { className: "field" }, el("label", { htmlFor: id }, label), input, range, note, error);
  field.dataset.param = key;
  return field;
}

/** A slider beside a number. The number has the name and the keys. */
function rangeOf(input, min, max, step) {
  const range = el("input", { type: "range", min, max, step, tabIndex: -1 });
  range.setAttribute("aria-hidden", "true");
  range.value = input.value;
  range.addEventListener("input", () => (input.value = range.value));
  input.addEventListener("input", () => (range.value = input.value));
  return range;
}

/** The fields of a form that hold values. */
export const inputs = (form) => [...form.querySelectorAll("input[id]:not([type=file]), textarea, select")];

/** What stands in them, by id. */
export const values = (form) => Object.fromEntries(inputs(form).map((input) => [input.id, input.value]));

/** Put values back into them; those without one stay. */
export function write(form, given) {
  for (const input of inputs(form)) {
    if (!(input.id in given)) continue;
    input.value = given[input.id];
    const range = input.parentElement.querySelector("input[type=range]");
    if (range) range.value = input.value;
  }
}

/** Keep what is typed into a form from visit to visit; returns whether there was something. */
export function remember(form, key) {
  const stored = localStorage.getItem(key); // before it is written for the first time
  if (stored !== null) write(form, JSON.parse(stored));
  form.addEventListener("input", () => localStorage.setItem(key, JSON.stringify(values(form))));
  return stored !== null;
}

/** What is set in the fields of `keys`, where it is not the model's own value. */
export function chosen(form, keys, prefix = "") {
  const given = {};
  for (const key of keys) {
    const input = form.querySelector(`#${prefix}${key}`);
    const text = input.value.trim();
    if (text !== "" && text !== input.dataset.initial) given[key] = typed(text);
  }
  return given;
}

/** Show what the server says of a field; returns whether there is such a field. */
export function showError(form, param, message) {
  const field = form.querySelector(`[data-param="${CSS.escape(param)}"]`);
  if (field === null) return false;
  const error = field.querySelector(".error");
  error.textContent = message;
  for (const input of field.querySelectorAll("input:not([type=range]), textarea, select")) {
    if (message) {
      input.setAttribute("aria-invalid", "true");
      input.setAttribute("aria-describedby", error.id);
    } else {
      input.removeAttribute("aria-invalid");
      input.removeAttribute("aria-describedby");
    }
  }
  if (message) {
    const hidden = field.closest("details:not([open])");
    if (hidden) hidden.open = true;
    field.querySelector("input:not([hidden]), textarea, select, button").focus();
  }
  return true;
}

export function clearErrors(form) {
  for (const field of form.querySelectorAll("[data-param]")) showError(form, field.dataset.param, "");
  for (const error of form.querySelectorAll(".error.general")) error.textContent = "";
}
