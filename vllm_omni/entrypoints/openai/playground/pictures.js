// Pictures: ties form, requests, picture, history and code together.
import { ApiError, explain, hasKey } from "./api.js";
import { CodePanel } from "./code.js";
import { announce, byId, el, sure } from "./dom.js";
import * as gallery from "./gallery.js";
import { TO_DRAW, ideas } from "./ideas.js";
import * as form from "./pictures_form.js";
import * as view from "./pictures_view.js";
import * as runs from "./runs.js";
import { pictures } from "./snippets.js";
import { edits, filesOf } from "./snippets_forms.js";

const code = new CodePanel(el("h2", {}, "Request"));
const NARROW = "(max-width: 760px)";

/** Build the page for a model; `image` is that part of /v1/omni/info. */
export async function build(name, image, stages) {
  form.build(name, image);
  view.setStages(stages);
  byId("picture-code").replaceWith(code.element);
  await runs.open({ shown, step, list });
  byId("picture-ideas").replaceChildren(...ideas(TO_DRAW, byId("prompt")));
  byId("change").hidden = !form.changes();
  if (form.changes()) byId("no-picture").children[1].append(" Pictures to change may go along with it.");
  form.onChange(() => runs.shown === null && showCode());
}

export const open = () => byId("prompt").focus({ preventScroll: true });

function shown() {
  gallery.mark(runs.shown);
  gallery.freeUrls(runs.runs, runs.shown);
  view.run(runs.shown, runs.seedOf);
  showCode();
}

function step(run) {
  if (run.total !== null) gallery.step(run);
  if (run === runs.shown) view.progress(run);
}

const list = () => gallery.list(runs.runs, runs.show);

function showCode() {
  const [body, files] = runs.shown === null ? [form.read(), form.files()] : [runs.repeatable(runs.shown), runs.shown.sources ?? []];
  if (files.length) code.show(edits(location.origin, body, files, hasKey()), filesOf(files));
  else code.show(pictures(location.origin, body, hasKey()));
}

async function draw() {
  form.clearErrors();
  if (matchMedia(NARROW).matches) byId("stage").scrollIntoView({ behavior: "smooth" });
  try {
    await runs.start(form.read(), form.files(), form.previews());
  } catch (error) {
    const said = explain(error);
    if (error instanceof ApiError && error.param !== null && form.refuse(error.param, said)) announce(said);
    else byId("form-error").textContent = said;
  }
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
byId("pictures").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    draw();
  } else if (event.key === "Escape" && runs.shown?.status === "running") {
    event.preventDefault();
    runs.cancel(runs.shown);
  }
});
byId("reset").addEventListener("click", form.reset);
byId("cancel").addEventListener("click", () => runs.cancel(runs.shown));
byId("download").addEventListener("click", () => view.download(runs.shown, runs.seedOf(runs.shown)));
byId("again").addEventListener("click", () => form.fill(runs.shown, runs.seedOf(runs.shown)));
byId("change").addEventListener("click", () => form.change(runs.shown.blobs));
byId("keep-seed").addEventListener("click", () => form.setSeed(runs.seedOf(runs.shown)));
byId("remove").addEventListener("click", () => runs.forget(runs.shown.id));
byId("clear").addEventListener("click", async () => {
  if (await sure("Delete all pictures from the history?")) runs.forgetAll();
});
