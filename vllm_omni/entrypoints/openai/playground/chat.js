// Chats: what is asked, how the answer comes, and what is kept of it.
import { explain, hasKey, stream } from "./api.js";
import * as attachments from "./attachments.js";
import { announce, byId, clock, el, sends } from "./dom.js";
import { TO_ASK, TO_DRAW, ideas } from "./ideas.js";
import { atEnd, toEnd } from "./end.js";
import * as fields from "./fields.js";
import { record as listen } from "./microphone.js";
import { wake } from "./player.js";
import { fromBase64, samplesOf } from "./sound.js";
import { FileData, chats } from "./snippets.js";
import * as store from "./store.js";
import { Turn } from "./turns.js";

const RATE = 24000; // of the pcm16 that chats stream
const LABELS = {
  temperature: "Temperature",
  top_p: "Top p",
  max_completion_tokens: "Most tokens",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  true_cfg_scale: "Guidance (CFG)",
  seed: "Seed",
};
const WITHOUT_SLIDER = new Set(["max_completion_tokens", "seed"]);
const form = byId("chat-form");
let model = "";
let facts = null;
let tray = null;
let context = null;
let records = []; // of turns, oldest first
let shown = []; // their Turns
let running = null; // an AbortController
let recording = null;
let last = []; // the records of the chat before this one

/** Build the page for a model; `chat` is that part of /v1/omni/info. */
export async function build(name, chat, stages) {
  [model, facts] = [name, chat];
  context = { model, stages, code, again };
  tray = new attachments.Tray(byId("attached"), model, facts);
  const kinds = Object.keys(chat.inputs);
  byId("files").accept = kinds.map((kind) => `${kind}/*`).join(",");
  byId("attach").hidden = kinds.length === 0;
  byId("record").hidden = !kinds.includes("audio");
  buildSettings();
  describe(kinds);
  fill((await store.all("turns")).filter((record) => record.model === model));
}

function fill(all) {
  records = all;
  shown = records.map((record) => new Turn(record, context));
  shown.forEach((turn) => turn.end());
  byId("turns").append(...shown.flatMap((turn) => turn.elements));
  changed();
}

/** The chat is what is looked at now. */
export function open() {
  byId("words").focus({ preventScroll: true });
  if (shown.length) toEnd();
}

function buildSettings() {
  const voices = facts.voices.map((voice) => [voice, voice]);
  byId("voice").replaceChildren(...voices.map(([value, text]) => el("option", { value }, text)));
  byId("voice-field").hidden = voices.length === 0 || !facts.speaks;
  byId("answer").hidden = !facts.speaks;
  byId("system-field").hidden = facts.answers.includes("image");
  const keys = Object.keys(facts.parameters);
  byId("chat-numbers").replaceChildren(
    ...keys.map((key) => fields.numberField(key, LABELS[key], facts.parameters[key], { id: `chat-${key}`, slider: !WITHOUT_SLIDER.has(key) })),
  );
  for (const key of keys) byId(`chat-${key}`).placeholder = key === "seed" ? "random" : "the model's own";
  const had = fields.remember(form, `omni.chat.${model}`);
  const speak = localStorage.getItem("omni.chat.answer");
  const answer = speak !== null && had ? speak : facts.speaks ? "speech" : "text";
  for (const radio of form.elements["answer-as"]) {
    radio.checked = radio.value === answer;
    radio.addEventListener("change", () => {
      localStorage.setItem("omni.chat.answer", radio.value);
      byId("voice").disabled = radio.value === "text";
    });
  }
  byId("voice").disabled = answer === "text";
}

function describe(kinds) {
  const draws = facts.answers.includes("image");
  const reads = ["text", ...attachments.kindsOf(facts.inputs)];
  const list = (words) => words.join(", ").replace(/, ([^,]*)$/, " and $1");
  byId("can").textContent = draws ? "It answers with pictures." : `It reads ${list(reads)}, and answers in ${facts.speaks ? "text and speech" : "text"}.`;
  byId("words").placeholder = draws ? "What the picture shows" : kinds.length ? "Ask something, or drop a file here" : "Ask something";
  byId("ideas").replaceChildren(...ideas(draws ? TO_DRAW : TO_ASK, byId("words")));
}

const speaks = () => facts.speaks && form.elements["answer-as"].value === "speech";

function changed() {
  byId("welcome").hidden = shown.length > 0;
  byId("bring-back").hidden = last.length === 0;
  byId("new-chat").disabled = shown.length === 0;
}

// ---------------------------------------------------------------- requests

/** The body of a request whose last turn is `record`. `file` writes a file's data. */
function bodyOf(record, before, file) {
  const messages = record.settings.system ? [{ role: "system", content: record.settings.system }] : [];
  let index = 0;
  for (const one of [...before, record]) {
    const parts = one.files.map((part) => attachments.part(part, file(part, index++)));
    const content = parts.length ? [...parts, ...(one.words ? [{ type: "text", text: one.words }] : [])] : one.words;
    messages.push({ role: "user", content });
    if (one !== record) messages.push({ role: "assistant", content: one.text });
  }
  return { model, messages, ...record.settings.options, stream: true };
}

/** Turns before one that the model is told of. A picture is no text, and what was stopped at once said nothing. */
const told = (record) => records.slice(0, records.indexOf(record)).filter((one) => one.text !== "");

function code(record) {
  const before = told(record);
  const files = [...before, record].flatMap((one) => one.files);
  const names = attachments.fileNames(files);
  const body = bodyOf(record, before, (file, index) => new FileData(names[index], file.type));
  const write = chats(location.origin, body, hasKey(), { draws: facts.answers.includes("image"), compat: facts.compat });
  return [write, files.map((file, index) => [names[index], () => attachments.blobOf(file)])];
}

function settings() {
  const options = fields.chosen(form, Object.keys(facts.parameters), "chat-");
  if (speaks()) {
    const voice = byId("voice").value;
    Object.assign(options, { modalities: ["text", "audio"], audio: { format: "pcm16", ...(voice ? { voice } : {}) } });
  }
  return { system: byId("system-field").hidden ? "" : byId("system").value.trim(), options };
}

function newRecord() {
  return {
    ...{ id: store.newId(), at: Date.now(), model, words: byId("words").value.trim(), files: tray.files, settings: settings() },
    ...{ text: "", thoughts: "", sound: null, rate: RATE, pictures: [], metrics: null, tokens: 0, stopped: false },
    seen: { first: null, word: null, sound: null, total: 0 },
  };
}

async function ask() {
  const record = newRecord();
  if (running !== null || (record.words === "" && record.files.length === 0)) return;
  fields.clearErrors(form);
  byId("chat-error").textContent = "";
  if (speaks()) wake(RATE);
  const turn = new Turn(record, context);
  records.push(record);
  shown.push(turn);
  byId("turns").append(...turn.elements);
  byId("words").value = "";
  tray.set([]);
  busy(new AbortController());
  changed();
  toEnd();
  announce("Sent.");
  try {
    await answer(record, turn);
    announce(record.text || "The picture is ready.");
  } catch (error) {
    if (error.name !== "AbortError") {
      if (records.includes(record)) takeBack(record, turn, error);
      return;
    }
    record.stopped = true;
    announce("Stopped.");
  } finally {
    busy(null);
  }
  if (!records.includes(record)) return; // a new chat has begun
  const stay = atEnd();
  turn.end();
  if (stay) toEnd();
  if (!(await store.keep("turns", record))) byId("chat-error").textContent = "The browser has no room to keep this turn.";
}

/** As if it had not been sent: the words are back where they can be changed. */
function takeBack(record, turn, error) {
  turn.remove();
  records = records.filter((one) => one !== record);
  shown = shown.filter((one) => one !== turn);
  changed();
  if (byId("words").value === "") byId("words").value = record.words;
  tray.set([...record.files, ...tray.files]);
  const param = (error.param ?? "").replace(/^max_tokens$/, "max_completion_tokens");
  const said = explain(error);
  if (fields.showError(form, param, said)) return announce(said);
  byId("chat-error").textContent = said;
  byId("words").focus();
}

async function answer(record, turn) {
  const body = { ...bodyOf(record, told(record), (file) => file.url), return_stage_metrics: true };
  if (!facts.answers.includes("image")) body.stream_options = { include_usage: true };
  const begun = performance.now();
  const now = () => (performance.now() - begun) / 1000;
  const pieces = [];
  try {
    for await (const event of stream("/v1/chat/completions", bodyJson(body), running.signal)) {
      if (event.metrics) record.metrics = event.metrics;
      if (event.usage) record.tokens = event.usage.completion_tokens;
      if (event.progress) turn.progress(event.progress.step, event.progress.total);
      take(shaped(event), record, turn, now, pieces);
    }
  } finally {
    record.seen.total = now();
    record.sound = pieces.length ? joined(pieces) : null;
  }
}

/** What a chunk adds. With `--compat upstream`, `modality` says what its content is. */
function shaped(event) {
  const delta = event.choices?.[0]?.delta ?? {};
  return event.modality === "audio" && delta.content ? { audio: { data: delta.content } } : delta;
}

function take(delta, record, turn, now, pieces) {
  const thought = delta.reasoning ?? delta.reasoning_content ?? "";
  if (thought) {
    record.thoughts += thought;
    turn.think(record.thoughts);
  }
  const text = (typeof delta.content === "string" ? delta.content : "") || delta.audio?.transcript || "";
  if (text) {
    record.seen.word ??= now();
    record.text += text;
    const stay = atEnd();
    turn.write(text, () => stay && toEnd());
  }
  if (delta.audio?.data) {
    record.seen.sound ??= now();
    const samples = samplesOf(fromBase64(delta.audio.data));
    if (samples.length) {
      pieces.push(samples);
      turn.speak(samples, RATE);
    }
  }
  if (Array.isArray(delta.content)) record.pictures.push(...delta.content.map((part) => part.image_url.url));
  if (text || delta.audio?.data || record.pictures.length) record.seen.first ??= now();
}

function joined(pieces) {
  const all = new Int16Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    all.set(piece, at);
    at += piece.length;
  }
  return all;
}

// A seed may have more digits than JSON.stringify writes.
const bodyJson = ({ seed, ...body }) => (seed === undefined ? JSON.stringify(body) : `{"seed": ${seed}, ${JSON.stringify(body).slice(1)}`);

function busy(controller) {
  running = controller;
  byId("send").hidden = controller !== null;
  byId("stop").hidden = controller === null;
}

function again(record) {
  byId("words").value = record.words;
  tray.set(record.files);
  byId("words").focus();
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("words").addEventListener("keydown", (event) => {
  if (!sends(event)) return;
  event.preventDefault();
  ask();
});
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", (event) => {
  const param = event.target.closest("[data-param]")?.dataset.param;
  if (param !== undefined) fields.showError(form, param, "");
});
byId("stop").addEventListener("click", () => running?.abort());
byId("chat").addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || (recording === null && running === null)) return;
  event.preventDefault();
  if (recording !== null) discard();
  else running.abort();
});
byId("new-chat").addEventListener("click", async () => {
  running?.abort();
  for (const turn of shown) turn.remove();
  last = records.filter((record) => record.seen.total > 0);
  [records, shown] = [[], []];
  byId("chat-error").textContent = "";
  changed();
  byId("words").focus();
  await Promise.all(last.map((record) => store.remove("turns", record.id)));
});
byId("bring-back").addEventListener("click", async () => {
  fill(last.splice(0));
  byId("words").focus();
  toEnd();
  await Promise.all(records.map((record) => store.keep("turns", record))); // all asked for before what may come next
});

// ---------------------------------------------------------------- media

async function guarded(action) {
  byId("chat-error").textContent = "";
  try {
    await action();
  } catch (error) {
    byId("chat-error").textContent = error.message;
  }
}

const add = (files) =>
  guarded(async () => {
    for (const file of files) await tray.add(file);
    byId("words").focus();
  });

byId("attach").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", (event) => {
  const files = [...event.target.files];
  event.target.value = "";
  add(files);
});
byId("ask").addEventListener("paste", (event) => {
  if (event.clipboardData.files.length === 0) return;
  event.preventDefault();
  add([...event.clipboardData.files]);
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  byId("chat").addEventListener(kind, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    byId("ask").classList.toggle("over", kind === "dragover");
    if (kind === "drop") add([...event.dataTransfer.files]);
  });
}

function recorded(current) {
  recording = current;
  byId("record").setAttribute("aria-pressed", String(current !== null));
  byId("record-label").textContent = current === null ? "Record" : "Stop recording 0:00";
  byId("level").hidden = current === null;
}

async function discard() {
  const { cancel, timer } = recording;
  clearInterval(timer);
  recorded(null);
  await cancel();
  announce("The recording was thrown away.");
}

byId("record").addEventListener("click", () =>
  guarded(async () => {
    if (recording === null) {
      const begun = performance.now();
      const current = await listen((loudness) => (byId("level").value = Math.sqrt(loudness)));
      current.timer = setInterval(() => {
        byId("record-label").textContent = `Stop recording ${clock((performance.now() - begun) / 1000)}`;
      }, 500);
      recorded(current);
      announce("Recording. Escape throws it away.");
    } else {
      const current = recording;
      clearInterval(current.timer);
      recorded(null);
      const count = 1 + tray.files.filter((file) => file.name.startsWith("recording")).length;
      await tray.add(new File([await current.stop()], `recording-${count}.wav`, { type: "audio/wav" }));
      byId("words").focus();
    }
  }),
);
