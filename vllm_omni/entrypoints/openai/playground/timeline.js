// Where the time of a request went, as bars: one row a stage, one for what the browser saw.
import { el, seconds } from "./dom.js";

const SHOWN = 5e-5; // seconds; less than that is neither seen nor worth a word
const WORDS = {
  wait: "wait for the stage",
  transfer: "transfer in and out",
  queue: "queue",
  encode: "encode text",
  denoise: "steps",
  decode: "decode",
  run: "run",
  first: "nothing to see yet",
  browser: "the answer comes",
};

/** The stages' names by id, without what all of them have. */
export function shortNames(stages) {
  const names = stages.map((stage) => stage.name.replace(/(ForConditionalGeneration|Pipeline|Model)$/, ""));
  const common = names.length < 2 ? 0 : [...names[0]].findIndex((letter, at) => names.some((name) => name[at] !== letter));
  const start = common < 1 ? 0 : (names[0].slice(0, common + 1).search(/[A-Z][^A-Z]*$/) ?? 0); // whole words alone
  return new Map(stages.map((stage, index) => [stage.stage_id, names[index].slice(Math.max(0, start))]));
}

/** Parts of a stage's time in order, [kind, seconds]. The server tells the two ways of transfer as one sum. */
function partsOf(times, engine) {
  const parts = [
    ["wait", times.wait_s ?? 0],
    ["transfer", times.transfer_s ?? 0],
    ["queue", (times.queue_s ?? 0) + (engine?.queue_s ?? 0)],
  ];
  let rest = (times.run_s ?? 0) - (engine?.queue_s ?? 0);
  for (const kind of ["encode", "denoise", "decode"]) {
    const part = engine?.[`${kind}_s`];
    if (part === undefined) continue;
    parts.push([kind, part]);
    rest -= part;
  }
  parts.push(["run", rest]);
  return parts.filter(([, value]) => value >= SHOWN);
}

function rowsOf(metrics, stages, total, first) {
  const rows = [];
  const names = shortNames(stages);
  for (const [id, times] of Object.entries(metrics.stages ?? {})) {
    const stage = stages.find((one) => String(one.stage_id) === id);
    // What stands beside `stages` is the engine's own account, of the stage that made the picture.
    const parts = partsOf(times, stage?.output === "image" ? metrics : null);
    rows.push({ name: `${id} ${names.get(stage?.stage_id) ?? "stage"}`, start: times.start_s ?? 0, parts });
  }
  const seen = [["first", first ?? 0], ["browser", total - (first ?? 0)]].filter(([, value]) => value >= SHOWN);
  rows.push({ name: "browser", start: 0, parts: seen });
  return rows;
}

function track(row, end) {
  const bars = [];
  let at = row.start;
  for (const [kind, value] of row.parts) {
    const bar = el("i", { className: kind, title: `${WORDS[kind]}: ${seconds(value)}` });
    bar.style.left = `${(100 * at) / end}%`;
    bar.style.width = `${(100 * value) / end}%`;
    bars.push(bar);
    at += value;
  }
  const text = row.parts.map(([kind, value]) => `${WORDS[kind]} ${seconds(value)}`).join(", ");
  return el("div", { className: "track", role: "img", "aria-label": `${row.name}: ${text}` }, ...bars);
}

function axis(end) {
  const step = 10 ** Math.floor(Math.log10(end));
  const mark = [0.2, 0.5, 1, 2, 5].map((factor) => factor * step).find((value) => end / value <= 5) ?? 5 * step;
  const marks = [];
  for (let at = 0; at <= end * 1.0001; at += mark) {
    const label = el("span", {}, at === 0 ? "0" : seconds(at));
    label.style.left = `${(100 * at) / end}%`;
    if (at > 0.95 * end) label.className = "end"; // a centred one would stand beyond the bars
    marks.push(label);
  }
  return el("div", { className: "axis", "aria-hidden": "true" }, ...marks);
}

/** Draw into `target`. `total`: seconds in the browser; `first`: those until something of the answer was there. */
export function draw(target, metrics, stages, total, first = null) {
  const rows = rowsOf(metrics, stages, total, first);
  const end = Math.max(...rows.map((row) => row.start + row.parts.reduce((sum, [, value]) => sum + value, 0)), 1e-3);
  const cells = rows.flatMap((row) => [
    el("span", { className: "name", title: row.name }, row.name),
    track(row, end),
    el("span", { className: "num" }, seconds(row.parts.reduce((sum, [, value]) => sum + value, 0))),
  ]);
  const sums = new Map();
  for (const [kind, value] of rows.flatMap((row) => row.parts)) sums.set(kind, (sums.get(kind) ?? 0) + value);
  const legend = [...sums].map(([kind, value]) =>
    el("span", {}, el("i", { className: kind }), `${WORDS[kind]} `, el("span", { className: "num" }, seconds(value))),
  );
  target.replaceChildren(
    ...cells,
    el("span", { className: "name" }),
    axis(end),
    el("span"),
    el("div", { className: "legend", "aria-hidden": "true" }, ...legend),
  );
}
