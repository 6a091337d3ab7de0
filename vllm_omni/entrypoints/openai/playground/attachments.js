// Files of the next message: chosen, dropped, pasted or recorded.
import { button, el, icon } from "./dom.js";
import { fromBase64, toBase64 } from "./sound.js";

const NAMES = { image: "pictures", audio: "sound", video: "video" };
const SUFFIXES = { "image/jpeg": "jpg", "audio/mpeg": "mp3", "audio/x-wav": "wav" };
const urls = new WeakMap(); // file -> URL of its bytes

/** What a model reads, in words. */
export const kindsOf = (inputs) => Object.keys(inputs).map((kind) => NAMES[kind] ?? kind);

/** A file as the page keeps it: {name, type, url}, the url with its data. */
export async function read(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  return { name: file.name, type: file.type, url: `data:${file.type};base64,${toBase64(bytes)}` };
}

export const kindOf = (file) => file.type.split("/")[0];

/** The part of a message that holds a file. */
export function part(file, url = file.url) {
  const field = `${kindOf(file)}_url`;
  return { type: field, [field]: { url } };
}

/** Names for files in a folder: simple ones, each once. */
export function fileNames(files) {
  const used = new Set();
  return files.map((file, index) => {
    let name = file.name;
    if (!/^\w[\w.-]{0,60}$/.test(name) || used.has(name)) {
      name = `file-${index + 1}.${SUFFIXES[file.type] ?? file.type.split("/")[1].replace(/\W/g, "")}`;
    }
    used.add(name);
    return name;
  });
}

export const blobOf = (file) => new Blob([fromBase64(file.url.slice(file.url.indexOf(",") + 1))], { type: file.type });

function shownUrl(file) {
  if (!urls.has(file)) urls.set(file, URL.createObjectURL(blobOf(file)));
  return urls.get(file);
}

/** A file as part of the conversation. */
export function view(file) {
  const url = shownUrl(file);
  if (kindOf(file) === "image") return el("a", { href: url, target: "_blank", title: file.name }, el("img", { src: url, alt: file.name }));
  return el(kindOf(file) === "video" ? "video" : "audio", { src: url, controls: true, title: file.name, "aria-label": file.name });
}

/** The tray of the composer. */
export class Tray {
  constructor(list, model, facts) {
    [this.list, this.model, this.facts] = [list, model, facts];
    this.files = [];
  }

  /** Throws with what is wrong when the model does not read it. */
  async add(file) {
    const { inputs, max_media_bytes: most } = this.facts;
    const kind = kindOf(file);
    if (!(kind in inputs)) throw new Error(`${file.name}: ${this.model} reads ${kindsOf(inputs).join(", ") || "text alone"}.`);
    if (file.size > most) throw new Error(`${file.name} is too large: ${megabytes(file.size)}; the server takes ${megabytes(most)}.`);
    const limit = inputs[kind];
    if (limit !== null && this.files.filter((other) => kindOf(other) === kind).length >= limit) {
      throw new Error(`${this.model} reads at most ${limit} of ${NAMES[kind]} in a message.`);
    }
    this.set([...this.files, await read(file)]);
  }

  set(files) {
    this.files = files;
    this.list.replaceChildren(...files.map((file) => this.chip(file)));
  }

  chip(file) {
    const small = kindOf(file) === "image" ? el("img", { src: shownUrl(file), alt: "" }) : icon(kindOf(file) === "audio" ? "sound" : "video");
    const drop = () => {
      this.set(this.files.filter((other) => other !== file));
      (this.list.querySelector("button") ?? this.list.closest("form").querySelector("textarea")).focus();
    };
    return el("li", {}, small, el("span", {}, file.name), button("\u00d7", drop, { "aria-label": `Remove ${file.name}`, className: "quiet" }));
  }
}

const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;
