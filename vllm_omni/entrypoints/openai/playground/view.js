// What is shown of a run: the picture, its facts, its progress, its times; and the gallery.
import { byId, el, seconds } from "./dom.js";
import * as timeline from "./timeline.js";

const TINY = 256;
const TINY_SHOWN = 384;
const NAMES = {
  size: "size",
  num_inference_steps: "steps",
  guidance_scale: "guidance",
  true_cfg_scale: "cfg",
  negative_prompt: "negative",
};
let stages = [];
let urls = new Map(); // blob -> its URL: one each, freed when nothing shows it
let ticking = null;

export const setStages = (list) => (stages = list);

function urlOf(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

function freeUrls(used) {
  for (const [blob, url] of urls) {
    if (used.has(blob)) continue;
    URL.revokeObjectURL(url);
    urls.delete(blob);
  }
}

/** Show one run; null shows that there is none. */
export function run(shown, seedOf) {
  const running = shown?.status === "running";
  byId("progress").hidden = !running;
  byId("said").hidden = shown === null;
  byId("said").textContent = shown?.body.prompt ?? "";
  byId("caption").hidden = shown === null || running;
  byId("times").hidden = shown === null || running;
  clearInterval(ticking);
  if (shown === null) {
    byId("canvas").replaceChildren(
      el("p", { className: "empty" }, "Nothing drawn yet.", el("br"), el("span", { className: "dim" }, "Ctrl + Enter draws.")),
    );
  } else if (running) {
    progress(shown);
    ticking = setInterval(() => progress(shown), 100);
  } else {
    finished(shown, seedOf(shown));
  }
  byId("canvas").classList.toggle("many", shown !== null && !running && shown.blobs.length > 1);
}

function progress(shown) {
  const meter = byId("meter");
  const past = (performance.now() - shown.begun) / 1000;
  if (byId("canvas").firstElementChild?.dataset.run !== shown.id) {
    const ghost = el("div", { className: "ghost" }, shown.body.size ?? "");
    ghost.dataset.run = shown.id;
    ghost.style.aspectRatio = (shown.body.size ?? "1x1").replace("x", " / ");
    byId("canvas").replaceChildren(ghost);
  }
  if (shown.total === null) {
    meter.removeAttribute("aria-valuenow");
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

function finished(shown, seed) {
  if (byId("canvas").dataset.run !== shown.id || !byId("canvas").querySelector("img")) {
    const pictures = shown.blobs.map((blob) => {
      const image = el("img", { src: urlOf(blob), alt: shown.body.prompt, className: isTiny(shown) ? "tiny" : "" });
      if (isTiny(shown)) image.width = TINY_SHOWN;
      return el("a", { href: urlOf(blob), target: "_blank", title: "Open in full size" }, image);
    });
    byId("canvas").replaceChildren(...pictures);
    byId("canvas").dataset.run = shown.id;
  }
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
  byId("facts").replaceChildren(...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  timeline.draw(byId("timeline"), shown.metrics, stages, shown.seconds);
}

const isTiny = (shown) => Math.max(...(shown.size ?? "999x999").split("x").map(Number)) < TINY;

/** Draw the gallery: a tile a run, kept where its run is the same, so that focus stays. */
export function gallery(runs, shown, show) {
  const list = byId("gallery");
  const old = new Map([...list.children].map((item) => [item.dataset.key, item]));
  const items = runs.map((one) => {
    const key = `${one.id} ${one.status}`;
    const item = old.get(key) ?? tile(one, key, show);
    const button = item.firstElementChild;
    if (one === shown) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
    const bar = button.querySelector("b");
    if (bar) bar.style.width = `${(100 * one.step) / (one.total ?? 1)}%`;
    return item;
  });
  if (items.length !== list.children.length || items.some((item, index) => list.children[index] !== item)) {
    const focused = document.activeElement?.closest?.("#gallery li");
    list.replaceChildren(...items);
    if (focused && focused.isConnected) focused.firstElementChild.focus();
  }
  const kept = runs.filter((one) => one.status === "done");
  byId("count").textContent = kept.length;
  byId("clear").disabled = kept.length === 0;
  freeUrls(new Set(kept.flatMap((one) => (one === shown ? [one.small, ...one.blobs] : [one.small]))));
}

function tile(one, key, show) {
  const words = one.body.prompt.length > 120 ? `${one.body.prompt.slice(0, 117)}...` : one.body.prompt;
  const button = el("button", { type: "button", title: words });
  if (one.status === "running") button.append("drawing", el("b"));
  else button.append(el("img", { src: urlOf(one.small), alt: words, className: isTiny(one) ? "tiny" : "", loading: "lazy" }));
  button.addEventListener("click", () => show(one));
  button.addEventListener("keydown", (event) => {
    const to = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    button.parentElement[to]?.firstElementChild.focus();
  });
  const item = el("li", {}, button);
  item.dataset.key = key;
  return item;
}

/** Save the pictures of a run as files. */
export function download(shown, seed) {
  const words = shown.body.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["picture"];
  const name = words.join("-").slice(0, 40);
  shown.blobs.forEach((blob, index) => {
    const many = shown.blobs.length > 1 ? `-${index}` : "";
    const suffix = blob.type.slice(6);
    const link = el("a", { href: urlOf(blob), download: `${name}${seed === null ? "" : `-${seed}`}${many}.${suffix}` });
    document.body.append(link);
    link.click();
    link.remove();
  });
}
