// Chats with a model that reads media and speaks.
import { stream } from "./api.js";
import { announce, byId, el } from "./dom.js";
import { Player, fromBase64, record, toBase64, wake } from "./sound.js";

let model = "";
let facts = null;
let messages = []; // of the API
let media = []; // of the next message: {name, part, view}
let running = null;
let recording = null;

/** Show the chat of a model; `chat` is that part of /v1/omni/info. */
export function open(name, chat) {
  model = name;
  facts = chat;
  const kinds = Object.keys(chat.inputs);
  byId("files").accept = kinds.map((kind) => `${kind}/*`).join(",");
  byId("attach").hidden = kinds.length === 0;
  byId("record").hidden = !kinds.includes("audio");
  const voices = chat.speaks ? (chat.voices.length ? chat.voices.map((voice) => [voice, `spoken by ${voice}`]) : [["", "spoken"]]) : [];
  byId("voice").replaceChildren(...voices.map(([value, text]) => option(`voice:${value}`, text)), option("text", "as text"));
  byId("voice").hidden = byId("voice-label").hidden = !chat.speaks;
  byId("chat").hidden = false;
  byId("words").focus();
}

const option = (value, text) => el("option", { value }, text);

// ---------------------------------------------------------------- media

function attach(name, type, bytes) {
  const kind = type.split("/")[0];
  if (!(kind in facts.inputs)) throw new Error(`${name}: ${model} reads ${Object.keys(facts.inputs).join(", ")}`);
  const data = toBase64(bytes);
  const url = URL.createObjectURL(new Blob([bytes], { type }));
  const field = `${kind}_url`;
  const part = { type: field, [field]: { url: `data:${type};base64,${data}` } };
  const view = {
    image: () => el("img", { src: url, alt: name }),
    video: () => el("video", { src: url, controls: true, title: name }),
    audio: () => el("audio", { src: url, controls: true, title: name }),
  }[kind];
  media.push({ name, part, view });
  showMedia();
}

function showMedia() {
  byId("attached").replaceChildren(
    ...media.map((one) => {
      const button = el("button", { type: "button", "aria-label": `Remove ${one.name}` }, `${one.name} \u00d7`);
      button.addEventListener("click", () => {
        media = media.filter((other) => other !== one);
        showMedia();
      });
      return el("li", {}, button);
    }),
  );
}

async function guarded(action) {
  byId("chat-error").textContent = "";
  try {
    await action();
  } catch (error) {
    byId("chat-error").textContent = error.message;
  }
}

byId("files").addEventListener("change", (event) =>
  guarded(async () => {
    const files = [...event.target.files];
    event.target.value = "";
    for (const file of files) attach(file.name, file.type, new Uint8Array(await file.arrayBuffer()));
  }),
);
byId("record").addEventListener("click", () =>
  guarded(async () => {
    if (recording === null) {
      recording = await record();
    } else {
      const current = recording;
      recording = null;
      attach("recording.wav", "audio/wav", await current.stop());
    }
    byId("record").textContent = recording === null ? "Record" : "Stop recording";
    byId("record").setAttribute("aria-pressed", String(recording !== null));
  }),
);

// ---------------------------------------------------------------- turns

function turn(who, className, ...children) {
  const item = el("li", { className }, el("h2", {}, who), ...children);
  byId("turns").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

async function ask() {
  const words = byId("words").value;
  if (running !== null || (words.trim() === "" && media.length === 0)) return;
  byId("chat-error").textContent = "";
  const content = media.length ? [...media.map((one) => one.part), ...(words ? [{ type: "text", text: words }] : [])] : words;
  const mine = turn("You", "mine", ...media.map((one) => one.view()), el("p", { className: "text" }, words));
  const text = el("p", { className: "text" });
  const theirs = turn(model, "theirs", text);
  const before = { words, media };
  [byId("words").value, media] = ["", []];
  showMedia();
  const question = { role: "user", content };
  running = new AbortController();
  busy(true);
  try {
    await answer([...messages, question], theirs, text);
    announce(text.textContent);
  } catch (error) {
    if (error.name !== "AbortError") {
      // As if it had not been sent: the words are back where they can be changed.
      mine.remove();
      theirs.remove();
      byId("words").value = before.words;
      media = before.media;
      showMedia();
      byId("chat-error").textContent = error.message;
      return;
    }
    announce("Stopped.");
  } finally {
    running = null;
    busy(false);
  }
  messages.push(question, { role: "assistant", content: text.textContent });
}

async function answer(turns, theirs, text) {
  const choice = byId("voice").value;
  const body = { model, messages: turns, stream: true };
  let player = null;
  if (choice !== "text") {
    wake();
    const voice = choice.slice("voice:".length);
    body.modalities = ["text", "audio"];
    body.audio = { format: "pcm16", ...(voice ? { voice } : {}) };
  }
  try {
    for await (const event of stream("/v1/chat/completions", JSON.stringify(body), running.signal)) {
      const delta = event.choices?.[0]?.delta ?? {};
      text.textContent += delta.content ?? delta.audio?.transcript ?? "";
      if (delta.audio?.data) {
        if (player === null) {
          player = new Player();
          theirs.append(player.element);
        }
        player.add(fromBase64(delta.audio.data));
      }
      theirs.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    player?.stop();
    throw error;
  } finally {
    player?.end();
  }
}

function busy(is) {
  byId("send").hidden = is;
  byId("stop").hidden = !is;
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    ask();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new-chat").addEventListener("click", () => {
  running?.abort();
  messages = [];
  byId("turns").replaceChildren();
  byId("words").focus();
});
