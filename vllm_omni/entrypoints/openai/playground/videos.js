// Videos: a form, and the jobs that it begins, each with its player.
import { ApiError, explain, hasKey } from "./api.js";
import { view } from "./attachments.js";
import { announce, byId, button, el, saveAs, seconds, sure } from "./dom.js";
import * as fields from "./fields.js";
import * as films from "./films.js";
import { TO_FILM, ideas } from "./ideas.js";
import { inspectButton } from "./inspector.js";
import { filesOf, videos } from "./snippets_forms.js";
import { Sources } from "./sources.js";

const LABELS = {
  seconds: "Seconds",
  num_frames: "Frames",
  fps: "Frames per second",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  true_cfg_scale: "Guidance (CFG)",
  seed: "Seed",
};
const HINTS = { seconds: "or frames", num_frames: "or seconds" };
const NARROW = "(max-width: 760px)";
const form = byId("video-form");
const items = new Map(); // film -> its place in the list
const urls = new Map(); // film -> URL of its file
let model = "";
let context = null;
let sources = null;

/** Build the page for a model; `facts` is that part of /v1/omni/info. */
export async function build(name, facts, stages) {
  model = name;
  const code = ({ body, sources: files }) => [videos(location.origin, body, files, hasKey()), filesOf(files)];
  context = { stages, code };
  sources = new Sources(form, "input_reference", "Picture to begin with", name, facts, () => {});
  byId("video-sources").replaceWith(sources.element);
  const shown = Object.keys(LABELS).filter((key) => key in facts.parameters);
  const numbers = shown.map((key) =>
    fields.numberField(key, LABELS[key], facts.parameters[key], { id: `video-${key}`, slider: false, hint: HINTS[key] ?? "" }),
  );
  byId("video-numbers").replaceChildren(...numbers);
  for (const key of shown) byId(`video-${key}`).placeholder = key === "seed" ? "random" : "the model's own";
  const [width, height] = facts.size.default;
  byId("video-size").placeholder = width === null ? "the model's own" : `${width}x${height}`;
  byId("film-ideas").replaceChildren(...ideas(TO_FILM, byId("video-prompt")));
  fields.remember(form, `omni.video.${model}`);
  await films.open(name, heard);
  changed();
}

export const open = () => byId("video-prompt").focus({ preventScroll: true });

function read() {
  const body = { model, prompt: byId("video-prompt").value };
  if (byId("video-negative_prompt").value.trim()) body.negative_prompt = byId("video-negative_prompt").value;
  if (byId("video-size").value.trim()) body.size = byId("video-size").value.trim();
  const shown = Object.keys(LABELS).filter((key) => byId(`video-${key}`) !== null);
  return { ...body, ...fields.chosen(form, shown, "video-") };
}

function fill({ body, sources: files }) {
  const numbers = Object.keys(LABELS).filter((key) => byId(`video-${key}`) !== null).map((key) => [`video-${key}`, body[key] ?? ""]);
  const texts = { "video-prompt": body.prompt, "video-negative_prompt": body.negative_prompt ?? "", "video-size": body.size ?? "" };
  fields.clearErrors(form);
  fields.write(form, { ...texts, ...Object.fromEntries(numbers) });
  sources.set(files);
  byId("video-prompt").focus();
}

async function begin() {
  fields.clearErrors(form);
  byId("film").disabled = true;
  try {
    await films.start(read(), sources.files);
    if (matchMedia(NARROW).matches) byId("films").scrollIntoView({ behavior: "smooth" });
  } catch (error) {
    const said = explain(error);
    if (error instanceof ApiError && error.param !== null && fields.showError(form, error.param, said)) announce(said);
    else byId("video-error").textContent = said;
  } finally {
    byId("film").disabled = false;
  }
}

// ---------------------------------------------------------------- the list

function heard(film, what) {
  if (what === "gone") {
    URL.revokeObjectURL(urls.get(film));
    urls.delete(film);
    items.get(film).remove();
    items.delete(film);
  } else if (what === "step") {
    progress(film);
  } else {
    if (what !== "end") {
      items.set(film, el("li", { className: "film" }));
      byId("films")[what === "old" ? "append" : "prepend"](items.get(film));
    }
    draw(film);
  }
  changed();
}

function changed() {
  byId("no-films").hidden = items.size > 0;
  byId("clear-films").disabled = ![...items.keys()].some((film) => film.status !== "running");
}

function draw(film) {
  const item = items.get(film);
  const prompt = el("p", { className: "text" }, film.body.prompt);
  const parts = film.status === "running" ? [coming(film)] : film.status === "done" ? [player(film)] : [trouble(film)];
  const actions = [];
  if (film.status === "done") actions.push(button("Download", () => saveAs(film.blob, `${nameOf(film)}.mp4`)));
  if (film.status !== "running") {
    actions.push(button("Use again", () => fill(film), { className: "quiet" }));
    actions.push(inspectButton(item, film, context), button("Delete", () => films.forget(film), { className: "quiet" }));
  }
  const from = el("div", { className: "from" }, ...film.sources.map(view));
  from.hidden = film.sources.length === 0;
  const foot = el("div", { className: "foot" }, ...actions, el("span", { className: "num" }, factsOf(film)));
  foot.hidden = film.status === "running";
  item.replaceChildren(...parts, prompt, from, foot);
  if (film.status === "running") progress(film);
}

function coming(film) {
  const [width, height] = /^\d+x\d+$/.test(film.body.size ?? "") ? film.body.size.split("x") : [16, 9];
  const ghost = el("div", { className: "ghost" }, el("span"));
  ghost.style.aspectRatio = `${width} / ${height}`;
  const attributes = { role: "progressbar", "aria-label": "Progress", "aria-valuemin": "0", "aria-valuemax": "100" };
  const meter = el("div", { className: "meter", ...attributes }, el("i"));
  return el("div", { className: "coming" }, ghost, el("div", { className: "row" }, meter, button("Cancel", () => films.forget(film))));
}

function progress(film) {
  const meter = items.get(film)?.querySelector(".meter");
  if (!meter) return;
  const known = film.progress > 0;
  if (known) meter.setAttribute("aria-valuenow", film.progress);
  meter.firstElementChild.style.width = known ? `${film.progress}%` : "";
  items.get(film).querySelector(".ghost span").textContent = known ? `${film.progress} %` : "queued or starting";
}

function player(film) {
  if (!urls.has(film)) urls.set(film, URL.createObjectURL(film.blob));
  const video = el("video", { src: urls.get(film), controls: true, loop: true, muted: true, "aria-label": film.body.prompt });
  const [width, height] = film.facts.size.split("x").map(Number);
  video.style.aspectRatio = `${width} / ${height}`;
  return video;
}

function trouble(film) {
  if (film.status === "failed") return el("p", { className: "error general" }, film.error);
  const again = button("Look again", () => location.reload());
  return el("p", { className: "error general" }, "The server cannot be reached. ", again);
}

function factsOf({ body, facts, seen }) {
  if (!facts) return "";
  const parts = [facts.size, `${facts.frames} frames, ${facts.fps} a second`, body.seed === undefined ? "" : `seed ${body.seed}`, seconds(seen.total)];
  return parts.filter(Boolean).join(" \u00b7 ");
}

const nameOf = ({ body }) => (body.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["video"]).join("-").slice(0, 40);

form.addEventListener("submit", (event) => {
  event.preventDefault();
  begin();
});
form.addEventListener("input", (event) => {
  const param = event.target.closest("[data-param]")?.dataset.param;
  if (param !== undefined) fields.showError(form, param, "");
});
byId("videos").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    begin();
  } else if (event.key === "Escape") {
    const newest = films.films.find((film) => film.status === "running");
    if (newest !== undefined) films.forget(newest);
  }
});
byId("clear-films").addEventListener("click", async () => {
  if (await sure("Delete all videos?")) films.forgetAll();
});
