// The requests of this page: those that run, and those that the history holds. One of them is shown.
import { ApiError, stream } from "./api.js";
import { announce } from "./dom.js";
import * as history from "./history.js";
import { toJson } from "./snippets.js";

/** Newest first. A run: {id, at, model, body, status, step, total, seconds, blobs, small, metrics, size}. */
export let runs = [];
export let shown = null;
let notify = () => {};

/** Load the history; `listener` is called with the changed run whenever there is something new to show. */
export async function open(listener) {
  notify = listener;
  const found = await history.open();
  runs = found.runs;
  show(runs[0] ?? null);
  return found.lasting;
}

export function show(run) {
  shown = run;
  notify(run);
}

/** Send a request. Rejects with what the server said; an abort resolves. */
export async function start(body) {
  const run = {
    id: crypto.getRandomValues(new Uint32Array(4)).join("-"),
    at: Date.now(),
    body,
    status: "running",
    step: 0,
    total: null,
    begun: performance.now(),
    abort: new AbortController(),
    pieces: [],
  };
  const before = shown;
  runs = [run, ...runs];
  show(run);
  announce("Drawing.");
  try {
    await follow(run);
    await finish(run);
  } catch (error) {
    runs = runs.filter((one) => one !== run);
    if (shown === run) show(runs.includes(before) ? before : (runs[0] ?? null));
    else notify(shown);
    if (error.name === "AbortError") announce("Cancelled.");
    else throw error;
  }
}

export const cancel = (run) => run.abort.abort();

async function follow(run) {
  const sent = { ...run.body, stream: true, return_stage_metrics: true };
  let told = 0;
  for await (const event of stream("/v1/images/generations", toJson(sent), run.abort.signal)) {
    if (event.type === "image_generation.progress") {
      if (run.total === null) run.first = performance.now();
      [run.step, run.total] = [event.step, event.total];
      const quarter = Math.floor((4 * event.step) / event.total);
      if (quarter > told) announce(`Step ${event.step} of ${event.total}.`);
      told = quarter;
      notify(run);
    } else if (event.type === "image_generation.completed") {
      run.pieces.push(event);
    }
  }
  if (run.pieces.length === 0) throw new ApiError({ message: "the answer ended without a picture" }, 0);
}

async function finish(run) {
  run.seconds = (performance.now() - run.begun) / 1000;
  const last = run.pieces.at(-1);
  const kept = {
    id: run.id,
    at: run.at,
    body: run.body,
    status: "done",
    seconds: run.seconds,
    metrics: last.metrics ?? {},
    size: last.size,
    blobs: run.pieces.map((piece) => decoded(piece.b64_json, piece.output_format)),
  };
  kept.small = await history.thumbnail(kept.blobs[0]);
  runs = runs.map((one) => (one === run ? kept : one));
  if (!(await history.keep(kept))) announce("The browser has no room to keep this picture.");
  for (const id of history.beyondLimit(runs)) await forget(id);
  announce(`${kept.blobs.length > 1 ? `${kept.blobs.length} pictures are` : "The picture is"} ready.`);
  if (shown === run) show(kept);
  else notify(kept);
}

function decoded(base64, format) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format}` });
}

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
  await history.remove(id);
  if (shown?.id === id) show(runs[Math.min(index, runs.length - 1)] ?? null);
  else notify(shown);
}

export async function forgetAll() {
  runs = runs.filter((run) => run.status === "running");
  await history.clear();
  show(runs[0] ?? null);
}
