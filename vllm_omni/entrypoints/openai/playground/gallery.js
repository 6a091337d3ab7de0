// The history of pictures as tiles. Only what has changed is touched.
import { byId, el } from "./dom.js";

const TINY = 256;
const tiles = new Map(); // id -> {item, status}
const urls = new Map(); // blob -> its URL: one each, freed when nothing shows it
let current = null; // the tile of the shown run

export const isTiny = (run) => Math.max(...(run.size ?? "999x999").split("x").map(Number)) < TINY;

export function urlOf(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

/** Free the URLs of the pictures of runs, but for the small ones that tiles show. */
export function freeUrls(runs, shown) {
  const used = new Set(runs.map((one) => one.small));
  for (const blob of shown?.blobs ?? []) used.add(blob);
  for (const [blob, url] of urls) {
    if (used.has(blob)) continue;
    URL.revokeObjectURL(url);
    urls.delete(blob);
  }
}

/** The tiles of all runs: new ones come in, those of runs that are gone go out. */
export function list(runs, show) {
  const gallery = byId("gallery");
  const ids = new Set(runs.map((run) => run.id));
  for (const [id, { item }] of tiles) {
    if (ids.has(id)) continue;
    if (item.contains(document.activeElement)) (item.nextElementSibling ?? item.previousElementSibling)?.firstElementChild.focus();
    item.remove();
    tiles.delete(id);
  }
  let after = null; // what comes before the tile
  for (const run of runs) {
    let known = tiles.get(run.id);
    if (known === undefined) {
      known = { item: el("li"), status: null };
      tiles.set(run.id, known);
      if (after === null) gallery.prepend(known.item);
      else after.after(known.item);
    }
    if (known.status !== run.status) draw(known, run, show);
    after = known.item;
  }
  const kept = runs.filter((run) => run.status === "done").length;
  byId("count").textContent = kept;
  byId("clear").disabled = kept === 0;
}

function draw(known, run, show) {
  const focused = known.item.contains(document.activeElement);
  const words = run.body.prompt.length > 120 ? `${run.body.prompt.slice(0, 117)}...` : run.body.prompt;
  const button = el("button", { type: "button", title: words });
  if (run.status === "running") button.append(el("span", {}, "drawing"), el("b"));
  else button.append(el("img", { src: urlOf(run.small), alt: words, className: isTiny(run) ? "tiny" : "", loading: "lazy", decoding: "async" }));
  button.addEventListener("click", () => show(run));
  if (known.item === current) button.setAttribute("aria-current", "true");
  known.item.replaceChildren(button);
  known.status = run.status;
  if (focused) button.focus();
}

/** Mark the tile of the shown run. */
export function mark(run) {
  current?.firstElementChild?.removeAttribute("aria-current");
  current = run === null ? null : tiles.get(run.id).item;
  current?.firstElementChild.setAttribute("aria-current", "true");
}

/** How far a run is. */
export function step(run) {
  tiles.get(run.id).item.querySelector("b").style.width = `${(100 * run.step) / run.total}%`;
}

byId("gallery").addEventListener("keydown", (event) => {
  const to = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  event.target.closest("li")[to]?.firstElementChild.focus();
});
