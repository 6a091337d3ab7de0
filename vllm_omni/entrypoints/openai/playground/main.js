// The page: asks the server what it serves, and opens what the model can do.
import { ApiError, explain, get, hasKey, setKey } from "./api.js";
import * as chat from "./chat.js";
import { byId, el } from "./dom.js";
import * as pictures from "./pictures.js";
import * as speech from "./speech.js";
import * as store from "./store.js";
import { shortNames } from "./timeline.js";
import * as videos from "./videos.js";

const HEALTH_MS = 4000;
// [name, part of the server's facts, word, module], in the order in which they are offered.
const MODES = [
  ["pictures", "image", "Pictures", pictures],
  ["videos", "video", "Videos", videos],
  ["chat", "chat", "Chat", chat],
  ["speech", "speech", "Speech", speech],
];
let offered = [];

async function connect() {
  let info = null;
  try {
    info = await get("/v1/omni/info");
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) askForKey(error);
    else notice(explain(error));
    return;
  }
  byId("unlock").hidden = true;
  byId("model").textContent = info.model;
  byId("model").title = info.model;
  byId("stages").textContent = described(info.stages);
  document.title = `${info.model} \u00b7 vllm-omni`;
  if (!(await store.lasting())) notice("This browser keeps nothing for the page: what is made here ends with it.");
  offered = MODES.filter(([, part]) => part in info);
  for (const [, part, , module] of offered) await module.build(info.model, info[part], info.stages);
  if (offered.length === 0) notice(`${info.model} makes ${info.output_modalities.join(" and ")}; this page has nothing for it.`);
  byId("modes").hidden = offered.length < 2;
  byId("modes").replaceChildren(...offered.map(([name, , word]) => el("a", { href: `#${name}` }, word)));
  choose();
}

/** Show what the address names, or the first that there is. */
function choose() {
  const chosen = offered.find(([name]) => location.hash === `#${name}`) ?? offered[0];
  if (chosen === undefined) return;
  for (const [name] of offered) byId(name).hidden = name !== chosen[0];
  for (const link of byId("modes").children) {
    if (link.hash === `#${chosen[0]}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  byId("skip").hash = { pictures: "#prompt", videos: "#video-prompt", chat: "#words", speech: "#input" }[chosen[0]];
  chosen[3].open();
}

/** The stages in a line; what they have in common is said once. */
function described(stages) {
  const facts = stages.map((stage) => [stage.device, stage.dtype?.replace("torch.", "")].filter(Boolean).join(" "));
  const same = facts.every((fact) => fact === facts[0]);
  const names = shortNames(stages);
  const parts = stages.map((stage, index) => {
    const ranks = stage.ranks > 1 ? `${stage.ranks} ranks` : "";
    return [names.get(stage.stage_id), same ? "" : facts[index], ranks].filter(Boolean).join(" ");
  });
  return parts.join(" \u2192 ") + (same && facts[0] ? ` \u00b7 ${facts[0]}` : "");
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
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.querySelector(byId("skip").hash).focus();
});
addEventListener("hashchange", choose);

// On narrow pages the settings are folded away; on wide ones they stand beside.
const wide = matchMedia("(min-width: 761px)");
const fold = () => document.querySelectorAll("details.settings").forEach((one) => (one.open = wide.matches));
wide.addEventListener("change", fold);
fold();

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
addEventListener("omni-request", () => setTimeout(health, 150));
document.addEventListener("visibilitychange", health);
health();
connect();
