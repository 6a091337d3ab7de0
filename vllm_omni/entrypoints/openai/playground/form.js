// The form: built from what the server says of its model, read into the body of a request, filled from one.
import { byId, el } from "./dom.js";

const LABELS = {
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  true_cfg_scale: "Guidance (CFG)",
  n: "Pictures",
};
const SHAPES = [[1, 1], [4, 3], [3, 4], [16, 9], [9, 16]];
const WHOLE = new Set(["num_inference_steps", "n"]);
const NUMBER = /^-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

let facts = null;
let model = "";
let listeners = [];

/** Build the fields for a model; `image` is that part of /v1/omni/info. */
export function build(name, image) {
  model = name;
  facts = image;
  const numbers = Object.keys(LABELS).filter((key) => key in image.parameters);
  byId("numbers").prepend(...numbers.map((key) => numberField(key, image.parameters[key])));
  byId("negative_prompt").placeholder = image.parameters.negative_prompt.default?.trim() || "What it should not show";
  byId("output_format").replaceChildren(...image.output_formats.map((format) => el("option", {}, format)));
  buildSize(image.size);
  byId("swap").addEventListener("click", () => setSize(byId("height").value, byId("width").value));
  byId("dice").addEventListener("click", () => set("seed", crypto.getRandomValues(new Uint32Array(1))[0]));
  byId("no-seed").addEventListener("click", () => set("seed", ""));
  byId("form").addEventListener("input", (event) => changed(event.target.closest("[data-param]")?.dataset.param));
  const stored = localStorage.getItem(`omni.form.${model}`); // before it is written for the first time
  reset();
  if (stored !== null) write(JSON.parse(stored));
}

/** Call `listener` when a value has changed. */
export const onChange = (listener) => listeners.push(listener);

function changed(param) {
  if (param !== undefined) showError(param, "");
  localStorage.setItem(`omni.form.${model}`, JSON.stringify(values()));
  markShape();
  for (const listener of listeners) listener();
}

function set(id, value) {
  byId(id).value = value;
  byId(id).dispatchEvent(new Event("input", { bubbles: true }));
}

function numberField(key, { default: initial, minimum, maximum }) {
  const label = LABELS[key];
  const hint = key === "true_cfg_scale" && facts.parameters.negative_prompt.default === null ? "with negative prompt" : "";
  const step = WHOLE.has(key) ? 1 : 0.1;
  const input = el("input", { id: key, inputMode: step === 1 ? "numeric" : "decimal", autocomplete: "off" });
  const bounded = key !== "n" && minimum !== undefined && maximum !== undefined;
  const range = bounded ? el("input", { type: "range", min: minimum, max: maximum, step, tabIndex: -1 }) : null;
  range?.setAttribute("aria-hidden", "true");
  range?.addEventListener("input", () => (input.value = range.value));
  input.addEventListener("input", () => range && (range.value = input.value));
  input.addEventListener("keydown", (event) => {
    const sign = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (sign === undefined) return;
    event.preventDefault();
    const next = (Number(input.value) || 0) + sign * step * (event.shiftKey ? 10 : 1);
    set(key, Number(Math.min(Math.max(next, minimum ?? -Infinity), maximum ?? Infinity).toFixed(4)));
  });
  input.dataset.initial = initial ?? "";
  const note = el("p", { className: "hint" }, hint);
  const error = el("p", { className: "error", id: `${key}-error` });
  const field = el("div", { className: "field" }, el("label", { htmlFor: key }, label), input, range, hint ? note : null, error);
  field.dataset.param = key;
  return field;
}

function buildSize({ default: [width, height], multiple, max_pixels: most }) {
  byId("width").dataset.initial = width ?? "";
  byId("height").dataset.initial = height ?? "";
  const million = (most / 2 ** 20).toFixed(most < 2 ** 20 ? 2 : 1).replace(/\.0$/, "");
  byId("size-hint").textContent = `${multiple > 1 ? `Multiples of ${multiple}, at` : "At"} most ${million} Mi pixels`;
  const area = (width ?? 1024) * (height ?? 1024);
  byId("shapes").replaceChildren(
    ...SHAPES.map(([across, down]) => {
      const side = (ratio) => Math.max(Math.round(Math.sqrt(area * ratio) / multiple), 1) * multiple;
      const [w, h] = [side(across / down), side(down / across)];
      const icon = el("i");
      icon.style.width = `${15 * Math.sqrt(across / down)}px`;
      icon.style.height = `${15 * Math.sqrt(down / across)}px`;
      const button = el("button", { type: "button", title: `${w} x ${h}` }, icon, `${across}:${down}`);
      button.dataset.size = `${w}x${h}`;
      button.addEventListener("click", () => setSize(w, h));
      return button;
    }),
  );
  for (const side of ["width", "height"]) {
    byId(side).addEventListener("keydown", (event) => {
      const sign = { ArrowUp: 1, ArrowDown: -1 }[event.key];
      if (sign === undefined) return;
      event.preventDefault();
      set(side, Math.max((Number(byId(side).value) || 0) + sign * multiple, multiple));
    });
  }
}

function setSize(width, height) {
  byId("width").value = width;
  set("height", height);
}

function markShape() {
  const size = `${byId("width").value}x${byId("height").value}`;
  for (const button of byId("shapes").children) button.setAttribute("aria-pressed", String(button.dataset.size === size));
}

const inputs = () => [...byId("form").querySelectorAll("input[id], textarea, select")];
const values = () => Object.fromEntries(inputs().map((input) => [input.id, input.value]));

function write(given) {
  for (const input of inputs()) {
    if (!(input.id in given)) continue;
    input.value = given[input.id];
    const range = input.parentElement.querySelector("input[type=range]");
    if (range) range.value = input.value;
  }
  changed();
}

/** Every field but the prompts back to the model's own value. */
export function reset() {
  clearErrors();
  write({ ...Object.fromEntries(inputs().map((input) => [input.id, input.dataset.initial ?? ""])), ...prompts(), output_format: "png" });
}

const prompts = () => ({ prompt: byId("prompt").value, negative_prompt: byId("negative_prompt").value });

/** A typed value: a number where it is one, else the text itself, for the server to say what is wrong with it. */
function typed(text) {
  const trimmed = text.trim();
  if (!NUMBER.test(trimmed)) return trimmed;
  const value = Number(trimmed);
  return /^-?\d+$/.test(trimmed) && !Number.isSafeInteger(value) ? BigInt(trimmed) : value;
}

/** The body of the request that the form describes. What is left empty is left out. */
export function read() {
  const body = { prompt: byId("prompt").value, model };
  if (byId("negative_prompt").value.trim()) body.negative_prompt = byId("negative_prompt").value;
  const [width, height] = [byId("width").value.trim(), byId("height").value.trim()];
  if (width || height) body.size = `${width}x${height}`;
  for (const key of [...Object.keys(facts.parameters).filter((name) => name in LABELS), "seed"]) {
    const value = typed(byId(key).value);
    // The model's own CFG scale is not spelt out: where it means "off", the server says so to a negative prompt.
    const own = key === "true_cfg_scale" && value === facts.parameters[key].default;
    if (value !== "" && !own) body[key] = value;
  }
  if (byId("output_format").value !== "png") body.output_format = byId("output_format").value;
  return body;
}

/** Fill the form with the parameters of an earlier request. */
export function fill(body, seed) {
  clearErrors();
  const [width, height] = (body.size ?? "x").split("x");
  const given = { negative_prompt: "", output_format: "png", ...body, width, height, seed: seed ?? "" };
  for (const key of Object.keys(facts.parameters)) if (key in LABELS) given[key] = body[key] ?? byId(key).dataset.initial;
  write(given);
  byId("prompt").focus();
}

export const setSeed = (seed) => set("seed", seed);

/** Show what the server says of a field; returns whether there is such a field. */
export function showError(param, message) {
  const field = byId("form").querySelector(`[data-param="${CSS.escape(param)}"]`);
  if (field === null) return false;
  field.querySelector(".error").textContent = message;
  for (const input of field.querySelectorAll("input:not([type=range]), textarea, select")) {
    if (message) {
      input.setAttribute("aria-invalid", "true");
      input.setAttribute("aria-describedby", `${param}-error`);
    } else {
      input.removeAttribute("aria-invalid");
      input.removeAttribute("aria-describedby");
    }
  }
  if (message) field.querySelector("input, textarea, select").focus();
  return true;
}

export function clearErrors() {
  for (const field of byId("form").querySelectorAll("[data-param]")) showError(field.dataset.param, "");
  byId("form-error").textContent = "";
}
