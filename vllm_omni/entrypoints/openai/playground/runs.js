// The requests for pictures: those that run, and those that the history holds. One of them is shown.
import { ApiError, stream } from "./api.js";
import { announce } from "./dom.js";
import { fromBase64 } from "./sound.js";
import { toJson } from "./snippets.js";
import { formOf } from "./snippets_forms.js";
import * as store from "./store.js";
import { thumbnail } from "./thumbnails.js";

const LIMIT = 200;

/** Newest first. A run: {id, at, body, sources, status, step, total, seconds, blobs, small, metrics, size}. */
export let runs = [];
export let shown = null;
let heard = {}; // {shown, step, list}: what is called when there is something new

/** Load the history; `listeners.shown()`, `.step(run)` and `.list()` are called when that has changed. */
export async function open(listeners) {
  heard = listeners;
  runs = (await store.all("runs")).reverse();
  heard.list();
  show(runs[0] ?? null);
}

export function show(run) {
  shown = run;
  heard.shown();
}

/** Send a request with pictures to change, or none, and a wish for previews. Rejects with what the server said; an abort resolves. */
export async function start(body, sources, previews) {
  const run = {
    id: store.newId(),
    at: Date.now(),
    body,
    sources,
    status: "running",
    step: 0,
    total: null,
    previews: [],
    begun: performance.now(),
    abort: new AbortController(),
    pieces: [],
  };
  const before = shown;
  runs = [run, ...runs];
  heard.list();
  show(run);
  announce("Drawing.");
  try {
    await follow(run, previews);
    await finish(run);
  } catch (error) {
    runs = runs.filter((one) => one !== run);
    heard.list();
    if (shown === run) show(runs.includes(before) ? before : (runs[0] ?? null));
    if (error.name === "AbortError") announce("Cancelled.");
    else throw error;
  }
}

export const cancel = (run) => run.abort.abort();

async function follow(run, previews) {
  const sent = { ...run.body, stream: true, return_stage_metrics: true, ...(previews === 0 ? {} : { partial_images: previews }) };
  const request = run.sources.length ? ["/v1/images/edits", formOf(sent, "image", run.sources)] : ["/v1/images/generations", toJson(sent)];
  for await (const event of stream(...request, run.abort.signal)) {
    const kind = event.type?.split(".")[1];
    if (kind === "progress") progress(run, event);
    else if (kind === "partial_image") preview(run, event);
    else if (kind === "completed") run.pieces.push(event);
  }
  if (run.pieces.length === 0) throw new ApiError({ message: "the answer ended without a picture" }, 0);
}

function progress(run, { step, total }) {
  if (run.total === null) {
    run.first = performance.now();
    run.firstSeconds = (run.first - run.begun) / 1000;
  }
  const quarter = (at) => Math.floor((4 * at) / total);
  if (quarter(step) > quarter(run.step)) announce(`Step ${step} of ${total}.`);
  [run.step, run.total] = [step, total];
  heard.step(run);
}

function preview(run, event) {
  run.previews[event.image_index ?? 0] = decoded(event);
  heard.step(run);
}

async function finish(run) {
  const last = run.pieces.at(-1);
  const kept = {
    id: run.id,
    at: run.at,
    body: run.body,
    sources: run.sources,
    status: "done",
    seconds: (performance.now() - run.begun) / 1000,
    first: run.firstSeconds ?? null,
    metrics: last.metrics ?? {},
    size: last.size,
    blobs: run.pieces.map(decoded),
  };
  kept.small = await thumbnail(kept.blobs[0]);
  const at = runs.indexOf(run);
  runs = runs.with(at, kept);
  heard.list();
  announce(`${kept.blobs.length > 1 ? `${kept.blobs.length} pictures are` : "The picture is"} ready.`);
  if (shown === run) show(kept);
  if (!(await store.keep("runs", kept))) announce("The browser has no room to keep this picture.");
  for (const old of runs.slice(LIMIT)) await forget(old.id);
}

const decoded = (event) => new Blob([fromBase64(event.b64_json)], { type: `image/${event.output_format}` });

/** The seed that made it, with all its digits. */
export const seedOf = (run) => run.body.seed ?? run.metrics?.seed ?? null;

/** The request with the seed that was drawn for it: sent again, it makes the same picture. */
export function repeatable(run) {
  const seed = seedOf(run);
  return seed === null ? run.body : { ...run.body, seed };
}

export async function forget(id) {
  const index = runs.findIndex((run) => run.id === id);
  runs = runs.filter((run) => run.id !== id);
  await store.remove("runs", id);
  heard.list();
  if (shown?.id === id) show(runs[Math.min(index, runs.length - 1)] ?? null);
}

export async function forgetAll() {
  runs = runs.filter((run) => run.status === "running");
  await store.clear("runs");
  heard.list();
  show(runs[0] ?? null);
}
