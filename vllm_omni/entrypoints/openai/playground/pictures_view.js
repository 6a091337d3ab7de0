// What is shown of a run: the picture, its facts, its progress and previews, its times.
import { view } from "./attachments.js";
import { byId, el, saveAs, seconds } from "./dom.js";
import * as timeline from "./timeline.js";
import { isTiny, urlOf } from "./gallery.js";

const TINY_SHOWN = 384;
const NAMES = {
  size: "size",
  num_inference_steps: "steps",
  guidance_scale: "guidance",
  true_cfg_scale: "cfg",
  negative_prompt: "negative",
};
let stages = [];
let ticking = null;

export const setStages = (list) => (stages = list);

/** Show one run; null shows that there is none. */
export function run(shown, seedOf) {
  const running = shown?.status === "running";
  byId("progress").hidden = !running;
  byId("said").hidden = shown === null;
  byId("said").textContent = shown?.body.prompt ?? "";
  byId("caption").hidden = shown === null || running;
  byId("times").hidden = shown === null || running;
  byId("no-picture").hidden = shown !== null;
  byId("canvas").hidden = shown === null;
  clearInterval(ticking);
  if (running) {
    progress(shown);
    ticking = setInterval(() => progress(shown), 100);
  } else if (shown !== null) {
    finished(shown, seedOf(shown));
  }
  const count = running ? shown.previews.length : (shown?.blobs.length ?? 0);
  byId("canvas").classList.toggle("many", count > 1);
}

/** The step, the time and the newest previews of a run that is shown. */
export function progress(shown) {
  const meter = byId("meter");
  const past = (performance.now() - shown.begun) / 1000;
  place(shown);
  if (shown.total === null) {
    meter.removeAttribute("aria-valuenow");
    meter.firstElementChild.style.width = "";
    byId("phase").textContent = "queued or starting";
    byId("pace").textContent = seconds(past);
    return;
  }
  meter.setAttribute("aria-valuemax", shown.total);
  meter.setAttribute("aria-valuenow", shown.step);
  meter.firstElementChild.style.width = `${(100 * shown.step) / shown.total}%`;
  const done = shown.step >= shown.total;
  byId("phase").textContent = done ? "decoding" : `step ${shown.step} of ${shown.total}`;
  const pace = (performance.now() - shown.first) / 1000 / Math.max(shown.step - 1, 1);
  const left = shown.step > 1 && !done ? `, ${seconds(pace * (shown.total - shown.step))} left` : "";
  byId("pace").textContent = `${seconds(past)}${left}`;
}

/** The place of the picture while there is none: its shape, or the newest previews. */
function place(shown) {
  const canvas = byId("canvas");
  if (canvas.dataset.run !== shown.id) {
    canvas.dataset.run = shown.id;
    const ghost = el("div", { className: "ghost" }, el("span", {}, shown.body.size ?? ""));
    ghost.style.aspectRatio = (shown.body.size ?? "1x1").replace("x", " / ");
    canvas.replaceChildren(ghost);
  }
  shown.previews.forEach((blob, index) => {
    let image = canvas.querySelectorAll("img.preview")[index];
    if (image?.blob === blob) return;
    if (image === undefined) {
      canvas.querySelector(".ghost")?.remove();
      image = el("img", { className: "preview", alt: "Preview" });
      canvas.append(image);
      canvas.classList.toggle("many", index > 0);
    }
    const [width, height] = (shown.body.size ?? "1024x1024").split("x").map(Number);
    if (Math.max(width, height) < 256) image.classList.add("tiny");
    image.width = Math.max(width, height) < 256 ? TINY_SHOWN : width;
    image.style.aspectRatio = `${width} / ${height}`;
    URL.revokeObjectURL(image.src);
    image.blob = blob;
    image.src = URL.createObjectURL(blob);
  });
}

function finished(shown, seed) {
  const canvas = byId("canvas");
  if (canvas.dataset.run !== shown.id || !canvas.querySelector("a")) {
    for (const image of canvas.querySelectorAll("img.preview")) URL.revokeObjectURL(image.src);
    const pictures = shown.blobs.map((blob) => {
      const image = el("img", { src: urlOf(blob), alt: shown.body.prompt, className: isTiny(shown) ? "tiny" : "" });
      if (isTiny(shown)) image.width = TINY_SHOWN;
      return el("a", { href: urlOf(blob), target: "_blank", title: "Open in full size" }, image);
    });
    canvas.replaceChildren(...pictures);
    canvas.dataset.run = shown.id;
  }
  byId("facts").replaceChildren(...factsOf(shown, seed).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  const from = shown.sources ?? [];
  byId("from").hidden = from.length === 0;
  byId("from").replaceChildren(el("p", { className: "dim" }, "Changed from"), ...from.map(view));
  timeline.draw(byId("timeline"), shown.metrics, stages, shown.seconds, shown.first ?? shown.seconds);
}

function factsOf(shown, seed) {
  const rows = Object.entries(NAMES).filter(([key]) => key in shown.body).map(([key, name]) => [name, String(shown.body[key])]);
  if (seed !== null) rows.push(["seed", String(seed)]);
  if (!("size" in shown.body)) rows.unshift(["size", shown.size]);
  rows.push(["time", seconds(shown.seconds)]);
  const { denoise_s: denoise, num_inference_steps: steps } = shown.metrics;
  if (denoise > 0 && steps) rows.push(["per step", seconds(denoise / steps)]);
  const batches = shown.metrics.batch_sizes ?? [];
  if (batches.some((size) => size > 1)) rows.push(["batch", batches.join(", ")]);
  const bytes = shown.blobs.reduce((sum, blob) => sum + blob.size, 0);
  rows.push(["file", `${shown.blobs[0].type.slice(6)}, ${Math.ceil(bytes / 1024)} KiB`]);
  return rows;
}

/** Save the pictures of a run as files. */
export function download(shown, seed) {
  const words = shown.body.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["picture"];
  const name = words.join("-").slice(0, 40);
  shown.blobs.forEach((blob, index) => {
    const many = shown.blobs.length > 1 ? `-${index}` : "";
    saveAs(blob, `${name}${seed === null ? "" : `-${seed}`}${many}.${blob.type.slice(6)}`);
  });
}
