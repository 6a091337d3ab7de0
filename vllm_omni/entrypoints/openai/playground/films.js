// The jobs that make videos: begun, followed to their end, also over a reload of the page, and kept.
import { ApiError, blob, get, post, remove } from "./api.js";
import { announce } from "./dom.js";
import { formOf } from "./snippets_forms.js";
import { toJson } from "./snippets.js";
import * as store from "./store.js";

const LIMIT = 50;
const PATH = "/v1/videos";
const ASK_MS = 500;

/** Newest first. A film: {id, at, body, sources, job, status, progress, error, metrics, seen, facts, blob}. */
export let films = [];
let heard = null; // called with a film that is new, has changed, or is gone

/** Load what is kept; what was being made is followed on. */
export async function open(model, listener) {
  heard = listener;
  films = (await store.all("films")).reverse().filter((film) => film.body.model === model);
  for (const film of films) {
    heard(film, "old");
    if (film.status === "running") follow(film);
  }
}

/** Begin one. Rejects with what the server said. */
export async function start(body, sources) {
  const job = sources.length ? await post(PATH, formOf(body, "input_reference", sources)) : await post(PATH, toJson(body));
  const film = { id: store.newId(), at: Date.now(), body, sources, job: job.id, status: "running", progress: 0, metrics: null };
  film.seen = { first: null, total: 0 };
  films = [film, ...films];
  heard(film, "new");
  announce("The video is begun.");
  await store.keep("films", film);
  follow(film);
  for (const old of films.slice(LIMIT).filter((one) => one.status !== "running")) await forget(old);
}

async function follow(film) {
  try {
    for (;;) {
      const job = await get(`${PATH}/${film.job}`);
      if (!films.includes(film)) return;
      if (job.progress !== film.progress || job.status !== film.state) heard(Object.assign(film, { progress: job.progress, state: job.status }), "step");
      if (job.status === "completed") return await finish(film, job);
      if (job.status === "failed") throw new ApiError(job.error, 200);
      await new Promise((resolve) => setTimeout(resolve, ASK_MS));
    }
  } catch (error) {
    if (!films.includes(film)) return;
    if (!(error instanceof ApiError)) {
      // Not reachable: the job may go on; the next load of the page looks again.
      heard(Object.assign(film, { status: "lost" }), "end");
      return;
    }
    Object.assign(film, { status: "failed", error: error.status === 404 ? "The server has it no more." : error.message });
    announce("The video failed.");
    await keep(film);
  }
}

async function finish(film, job) {
  film.seen.first = (Date.now() - film.at) / 1000;
  const data = await blob(`${PATH}/${film.job}/content`);
  film.seen.total = (Date.now() - film.at) / 1000;
  const facts = { size: job.size, frames: job.num_frames, fps: job.fps, seconds: job.duration_s };
  Object.assign(film, { status: "done", progress: 100, metrics: { stages: job.stage_durations }, facts, blob: data });
  announce("The video is ready.");
  await keep(film);
  remove(`${PATH}/${film.job}`).catch(() => {}); // it is here now; where this fails it expires there
}

async function keep(film) {
  heard(film, "end");
  if (!(await store.keep("films", film))) announce("The browser has no room to keep this video.");
}

/** Delete one; what is being made is cancelled. */
export async function forget(film) {
  films = films.filter((one) => one !== film);
  heard(film, "gone");
  await store.remove("films", film.id);
  if (film.status !== "done") await remove(`${PATH}/${film.job}`).catch(() => {});
}

export async function forgetAll() {
  for (const film of films.filter((one) => one.status !== "running")) await forget(film);
}
