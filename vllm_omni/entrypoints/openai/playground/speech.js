// Speech: a text is spoken; what was spoken is kept.
import { explain, hasKey, stream } from "./api.js";
import { announce, button, byId, el, seconds, sure } from "./dom.js";
import * as fields from "./fields.js";
import { TO_SAY, ideas } from "./ideas.js";
import { inspectButton } from "./inspector.js";
import { Player, played, wake } from "./player.js";
import { fromBase64, rateOf, samplesOf } from "./sound.js";
import { speech, toJson } from "./snippets.js";
import * as store from "./store.js";

const LIMIT = 100;
const HEAD = 44; // bytes of a WAV file before its samples
const USUAL_RATE = 24000;
const LABELS = { max_new_tokens: "Most tokens", seed: "Seed" };
const form = byId("speech-form");
let model = "";
let context = null;
let clips = []; // newest first: {record, item}
let running = null;

/** Build the page for a model; `facts` is that part of /v1/omni/info. */
export async function build(name, facts, stages) {
  model = name;
  context = { stages, code: (record) => [speech(location.origin, record.body, hasKey())] };
  byId("speech-voice").replaceChildren(...facts.voices.map((voice) => el("option", { value: voice }, voice)));
  byId("speech-voice-field").hidden = facts.voices.length === 0;
  const numbers = Object.keys(LABELS).map((key) =>
    fields.numberField(key, LABELS[key], facts.parameters[key], { id: `speech-${key}`, slider: false }),
  );
  byId("speech-numbers").replaceChildren(...numbers);
  byId("speech-seed").placeholder = "random";
  byId("speech-max_new_tokens").placeholder = "the model's own";
  byId("speech-ideas").replaceChildren(...ideas(TO_SAY, byId("input")));
  byId("input").maxLength = facts.parameters.input.maxLength;
  fields.remember(form, `omni.speech.${model}`);
  for (const record of (await store.all("clips")).reverse()) if (record.body.model === model) show(record, played(record.sound, record.rate, "speech"), true);
  changed();
}

export const open = () => byId("input").focus();

function changed() {
  byId("no-clips").hidden = clips.length > 0;
  byId("clear-clips").disabled = clips.length === 0;
}

function read() {
  const body = { model, input: byId("input").value };
  if (!byId("speech-voice-field").hidden) body.voice = byId("speech-voice").value;
  if (byId("instructions").value.trim()) body.instructions = byId("instructions").value;
  return { ...body, ...fields.chosen(form, Object.keys(LABELS), "speech-") };
}

/** A clip's place in the list. */
function show(record, player, last = false) {
  const item = el("li", { className: "clip" });
  const remove = button("Delete", () => forget(record.id), { className: "quiet" });
  const again = button("Use again", () => fill(record.body), { className: "quiet" });
  const facts = [record.body.voice, record.seen.sound ? `first sound ${seconds(record.seen.sound)}` : "", seconds(record.seen.total)];
  const actions = [again, inspectButton(item, record, context), remove, el("span", { className: "num" }, facts.filter(Boolean).join(" \u00b7 "))];
  item.append(el("p", { className: "text" }, record.body.input), player, el("div", { className: "foot" }, ...actions));
  clips[last ? "push" : "unshift"]({ record, item });
  byId("clips")[last ? "append" : "prepend"](item);
}

function fill(body) {
  const numbers = Object.keys(LABELS).map((key) => [`speech-${key}`, body[key] ?? byId(`speech-${key}`).dataset.initial]);
  fields.write(form, { input: body.input, instructions: body.instructions ?? "", "speech-voice": body.voice, ...Object.fromEntries(numbers) });
  byId("input").focus();
}

async function forget(id) {
  clips.find(({ record }) => record.id === id).item.remove();
  clips = clips.filter(({ record }) => record.id !== id);
  await store.remove("clips", id);
  changed();
}

async function speak() {
  if (running !== null) return;
  fields.clearErrors(form);
  const record = { id: store.newId(), at: Date.now(), body: read(), metrics: null, sound: null, rate: USUAL_RATE };
  record.seen = { first: null, sound: null, total: 0 };
  wake(USUAL_RATE); // on the click
  busy(new AbortController());
  announce("Speaking.");
  const coming = { player: null, pieces: [] };
  try {
    await follow(record, coming);
    announce("The speech is ready.");
  } catch (error) {
    if (error.name !== "AbortError") refused(error);
    else announce("Stopped.");
  } finally {
    busy(null);
  }
  byId("speaking").replaceChildren();
  if (coming.player === null) return;
  coming.player.end();
  record.sound = coming.player.sound.slice().slice();
  show(record, coming.player.element);
  changed();
  if (!(await store.keep("clips", record))) announce("The browser has no room to keep this.");
  for (const old of clips.slice(LIMIT)) await forget(old.record.id);
}

async function follow(record, coming) {
  const begun = performance.now();
  const now = () => (performance.now() - begun) / 1000;
  const sent = { ...record.body, response_format: "wav", stream_format: "sse", return_stage_metrics: true };
  try {
    for await (const event of stream("/v1/audio/speech", toJson(sent), running.signal)) {
      if (event.metrics) record.metrics = event.metrics;
      if (event.type !== "speech.audio.delta") continue;
      let bytes = fromBase64(event.audio);
      if (coming.player === null) {
        record.rate = rateOf(bytes);
        bytes = bytes.subarray(HEAD);
        coming.player = new Player(record.rate, "speech");
        byId("speaking").replaceChildren(coming.player.element);
        coming.player.play();
        record.seen.first = record.seen.sound = now();
      }
      coming.player.add(samplesOf(bytes));
    }
  } finally {
    record.seen.total = now();
  }
}

function refused(error) {
  const said = explain(error);
  if (error.param && fields.showError(form, error.param, said)) announce(said);
  else byId("speech-error").textContent = said;
}

function busy(controller) {
  running = controller;
  byId("speak").hidden = controller !== null;
  byId("silence").hidden = controller === null;
  byId("waiting-speech").hidden = controller === null;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  speak();
});
form.addEventListener("input", (event) => {
  const param = event.target.closest("[data-param]")?.dataset.param;
  if (param !== undefined) fields.showError(form, param, "");
});
byId("speech").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    speak();
  } else if (event.key === "Escape" && running !== null) {
    event.preventDefault();
    running.abort();
  }
});
byId("silence").addEventListener("click", () => running?.abort());
byId("clear-clips").addEventListener("click", async () => {
  if (!(await sure("Delete all that was spoken?"))) return;
  const gone = clips.splice(0);
  for (const { item } of gone) item.remove();
  changed();
  await Promise.all(gone.map(({ record }) => store.remove("clips", record.id)));
});
