// The form for pictures: built from what the server says of its model, read into the body of a request, filled from one.
import { byId, el } from "./dom.js";
import { Sources } from "./sources.js";
import { numberField, set, showError, typed, values, write as writeFields, clearErrors as clearFields } from "./fields.js";

const LABELS = {
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  true_cfg_scale: "Guidance (CFG)",
  n: "Pictures",
};
const SHAPES = [[1, 1], [4, 3], [3, 4], [16, 9], [9, 16]];
const PREVIEWS = 5;
const form = byId("form");
let facts = null;
let model = "";
let sources = null;
const listeners = [];

/** Build the fields for a model; `image` is that part of /v1/omni/info. */
export function build(name, image) {
  model = name;
  facts = image;
  const hint = (key) => (key === "true_cfg_scale" && image.parameters.negative_prompt.default === null ? "with negative prompt" : "");
  const numbers = Object.keys(LABELS).filter((key) => key in image.parameters);
  const made = numbers.map((key) => numberField(key, LABELS[key], image.parameters[key], { hint: hint(key), slider: key !== "n" }));
  if ("previews" in image) {
    made.push(numberField("partial_images", "Previews", { ...image.previews, default: PREVIEWS }, { slider: false }));
  }
  byId("numbers").prepend(...made);
  byId("negative_prompt").placeholder = image.parameters.negative_prompt.default?.trim() || "What it should not show";
  byId("output_format").replaceChildren(...image.output_formats.map((format) => el("option", {}, format)));
  buildSize(image.size);
  sources = new Sources(form, "image", "Pictures to change", name, image, sourced);
  byId("sources").replaceWith(sources.element);
  byId("swap").addEventListener("click", () => setSize(byId("height").value, byId("width").value));
  byId("dice").addEventListener("click", () => set(byId("seed"), crypto.getRandomValues(new Uint32Array(1))[0]));
  byId("no-seed").addEventListener("click", () => set(byId("seed"), ""));
  form.addEventListener("input", (event) => changed(event.target.closest("[data-param]")?.dataset.param));
  const stored = localStorage.getItem(`omni.form.${model}`); // before it is written for the first time
  reset();
  if (stored !== null) write(JSON.parse(stored));
}

/** Call `listener` when a value has changed. */
export const onChange = (listener) => listeners.push(listener);

function changed(param) {
  if (param !== undefined) showError(form, param, "");
  localStorage.setItem(`omni.form.${model}`, JSON.stringify(values(form)));
  markShape();
  for (const listener of listeners) listener();
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
      set(byId(side), Math.max((Number(byId(side).value) || 0) + sign * multiple, multiple));
    });
  }
}

/** What is changed has a size of its own: the fields are empty for it, until another one is typed. */
function sourced() {
  const [some, sides] = [sources.files.length > 0, [byId("width"), byId("height")]];
  const own = sides.every((side) => side.value === side.dataset.initial);
  const none = sides.every((side) => side.value === "");
  for (const side of sides) {
    side.placeholder = some ? "its own" : "";
    if (some && own) side.value = "";
    if (!some && none) side.value = side.dataset.initial;
  }
  changed();
}

function setSize(width, height) {
  byId("width").value = width;
  set(byId("height"), height);
}

function markShape() {
  const size = `${byId("width").value}x${byId("height").value}`;
  for (const button of byId("shapes").children) button.setAttribute("aria-pressed", String(button.dataset.size === size));
}

function write(given) {
  writeFields(form, given);
  changed();
}

/** Every field but the prompts back to the model's own value. */
export function reset() {
  clearErrors();
  const own = [...form.querySelectorAll("input[id]")].map((input) => [input.id, input.dataset.initial ?? ""]);
  write({ ...Object.fromEntries(own), output_format: "png" });
}

/** How many previews are wished for; none where the server makes none. */
export function previews() {
  const field = form.querySelector("#partial_images");
  const value = field === null ? 0 : typed(field.value);
  return value === "" ? 0 : value;
}

/** The pictures to change. */
export const files = () => sources.files;

/** Whether the model changes pictures. */
export const changes = () => "image" in facts.inputs;

/** Put finished pictures where those to change stand. */
export async function change(blobs) {
  sources.set([]);
  await sources.take(blobs.map((blob, index) => new File([blob], `picture-${index}.${blob.type.slice(6)}`, { type: blob.type })));
  byId("prompt").select();
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
    const off = key === "true_cfg_scale" && value === facts.parameters[key].default;
    if (value !== "" && !off) body[key] = value;
  }
  if (byId("output_format").value !== "png") body.output_format = byId("output_format").value;
  return body;
}

/** Fill the form with the parameters of an earlier request. */
export function fill({ body, sources: used = [] }, seed) {
  clearErrors();
  sources.set(used);
  const [width, height] = (body.size ?? "x").split("x");
  const given = { negative_prompt: "", output_format: "png", ...body, width, height, seed: seed ?? "" };
  for (const key of Object.keys(facts.parameters)) if (key in LABELS) given[key] = body[key] ?? byId(key).dataset.initial;
  write(given);
  byId("prompt").focus();
}

export const setSeed = (seed) => set(byId("seed"), seed);

/** Show what the server says of a field; returns whether there is such a field. */
export const refuse = (param, message) => showError(form, param, message);

export const clearErrors = () => clearFields(form);
