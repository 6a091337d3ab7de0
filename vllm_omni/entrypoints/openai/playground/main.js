// The page: asks the server what it serves, and ties form, requests, picture, history and code together.
import { ApiError, get, hasKey, setKey } from "./api.js";
import * as chat from "./chat.js";
import { announce, byId, copyText } from "./dom.js";
import * as form from "./form.js";
import * as runs from "./runs.js";
import { curl, python } from "./snippets.js";
import * as view from "./view.js";

const HEALTH_MS = 4000;
let info = null;
let language = localStorage.getItem("omni.language") === "python" ? "python" : "curl";

async function connect() {
  try {
    info = await get("/v1/omni/info");
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) askForKey(error);
    else notice(`The server does not answer: ${error.message}`);
    return;
  }
  byId("unlock").hidden = true;
  byId("model").textContent = info.model;
  byId("model").title = info.model;
  byId("stages").textContent = info.stages.map(described).join("  \u2192  ");
  document.title = `${info.model} \u00b7 vllm-omni`;
  if (info.image === undefined) {
    if (info.chat !== undefined) chat.open(info.model, info.chat);
    else notice(`${info.model} makes ${info.output_modalities.join(" and ")}; this page draws and chats.`);
    return;
  }
  form.build(info.model, info.image);
  view.setStages(info.stages);
  const lasting = await runs.open(render);
  if (!lasting) notice("This browser keeps nothing for the page: the history ends with it.");
  byId("work").hidden = false; // not before the history is there: requests are put on top of it
  byId("prompt").focus();
}

function described(stage) {
  const name = stage.name.replace("ForConditionalGeneration", "");
  const parts = [name, stage.device, stage.dtype?.replace("torch.", ""), stage.ranks > 1 ? `${stage.ranks} ranks` : ""];
  return parts.filter(Boolean).join(" ");
}

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = text === "";
}

function askForKey(error) {
  byId("unlock").hidden = false;
  notice(hasKey() ? error.message : "");
  byId("key").focus();
}

byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value);
  notice("");
  connect();
});

// ---------------------------------------------------------------- drawing

async function draw() {
  form.clearErrors();
  const body = form.read();
  if (matchMedia("(max-width: 760px)").matches) byId("stage").scrollIntoView({ behavior: "smooth" });
  const drawing = runs.start(body);
  setTimeout(health, 150);
  try {
    await drawing;
  } catch (error) {
    const said = error instanceof ApiError ? error.message : `The connection broke: ${error.message}`;
    if (error.param === null || error.param === undefined || !form.showError(error.param, said)) {
      byId("form-error").textContent = said;
    } else {
      announce(said);
    }
  }
  health();
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !byId("work").hidden && !byId("sure").open) {
    event.preventDefault();
    draw();
  }
});
byId("reset").addEventListener("click", form.reset);
byId("cancel").addEventListener("click", () => runs.cancel(runs.shown));

// ---------------------------------------------------------------- the shown run

function render(run) {
  view.gallery(runs.runs, runs.shown, runs.show);
  if (run === runs.shown) {
    view.run(runs.shown, runs.seedOf);
    code();
  }
}

function code() {
  const body = runs.shown === null ? form.read() : runs.repeatable(runs.shown);
  const write = language === "python" ? python : curl;
  byId("code").textContent = write(location.origin, body, hasKey());
  for (const button of document.querySelectorAll("[data-language]")) {
    button.setAttribute("aria-pressed", String(button.dataset.language === language));
  }
}

form.onChange(() => {
  if (runs.shown === null) code();
});
for (const button of document.querySelectorAll("[data-language]")) {
  button.addEventListener("click", () => {
    language = button.dataset.language;
    localStorage.setItem("omni.language", language);
    code();
  });
}
byId("copy").addEventListener("click", async () => {
  let said = "Copied";
  try {
    await copyText(byId("code").textContent, byId("code"));
  } catch {
    said = "Not copied: select it and press Ctrl + C";
  }
  byId("copy").textContent = said;
  announce(said);
  setTimeout(() => (byId("copy").textContent = "Copy"), 1600);
});
byId("download").addEventListener("click", () => view.download(runs.shown, runs.seedOf(runs.shown)));
byId("again").addEventListener("click", () => form.fill(runs.shown.body, runs.seedOf(runs.shown)));
byId("keep-seed").addEventListener("click", () => form.setSeed(runs.seedOf(runs.shown)));
byId("remove").addEventListener("click", () => runs.forget(runs.shown.id));
byId("clear").addEventListener("click", () => byId("sure").showModal());
byId("sure").addEventListener("close", () => {
  if (byId("sure").returnValue === "yes") runs.forgetAll();
  byId("sure").returnValue = "";
});

// ---------------------------------------------------------------- health

async function health() {
  if (document.hidden) return;
  let [state, said] = ["down", "not reachable"];
  try {
    const { open_requests: open } = await get("/health");
    [state, said] = open > 0 ? ["busy", `${open} running or queued`] : ["ok", "ready"];
  } catch (error) {
    if (error instanceof ApiError) said = error.message;
  }
  const shown = byId("health");
  if (shown.lastElementChild.textContent === said) return;
  shown.dataset.state = state;
  shown.lastElementChild.textContent = said;
}

setInterval(health, HEALTH_MS);
document.addEventListener("visibilitychange", health);
health();
connect();
