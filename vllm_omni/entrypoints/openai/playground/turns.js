// A turn of the conversation as people see it: the question, the answer as it comes, its sound, its facts, its request.
import * as attachments from "./attachments.js";
import { button, copyWith, el, icon, seconds, whenNear } from "./dom.js";
import { inspectButton } from "./inspector.js";
import { Writer } from "./markdown.js";
import { Player, played } from "./player.js";

function question(record, again) {
  const files = el("div", { className: "files", hidden: record.files.length === 0 });
  if (record.files.length) whenNear(files, () => files.replaceChildren(...record.files.map(attachments.view)));
  const reuse = button("Use again", again, { className: "quiet" });
  const words = record.words === "" ? null : el("p", { className: "text" }, record.words);
  return el("li", { className: "mine" }, el("h2", { className: "hidden" }, "You"), files, words, el("div", { className: "foot" }, reuse));
}

export class Turn {
  /** `context`: {model, stages, code(record), again(record)}. */
  constructor(record, context) {
    [this.record, this.context] = [record, context];
    this.text = el("div", { className: "text" });
    this.writer = new Writer(this.text);
    this.media = el("div", { className: "files", hidden: true });
    this.player = null;
    this.foot = el("div", { className: "foot" }, el("span", { className: "waiting" }, el("i"), el("i"), el("i"), " "));
    this.mine = question(record, () => context.again(record));
    this.theirs = el("li", { className: "theirs" }, el("h2", { className: "hidden" }, context.model), this.text, this.media, this.foot);
    this.theirs.setAttribute("aria-busy", "true");
    this.elements = [this.mine, this.theirs];
  }

  /** More of the text; `then` is called when it has been drawn. */
  write(piece, then) {
    this.writer.add(piece, then);
  }

  /** More of the sound. */
  speak(samples, rate) {
    if (this.player === null) {
      this.player = new Player(rate, "answer");
      this.text.before(this.player.element);
      this.player.play();
    }
    this.player.add(samples);
  }

  /** What the model thinks before it answers; folded away. */
  think(thoughts) {
    if (this.thoughts === undefined) {
      this.thoughts = el("p", {});
      this.text.before(el("details", { className: "thoughts" }, el("summary", {}, "Thoughts"), this.thoughts));
    }
    this.thoughts.textContent = thoughts;
  }

  progress(step, total) {
    this.foot.firstChild.lastChild.data = ` step ${step} of ${total}`;
  }

  /** Everything has come, or was stopped; the record is complete. */
  end() {
    const { record } = this;
    this.theirs.removeAttribute("aria-busy");
    if (record.thoughts) this.think(record.thoughts);
    this.writer.text = record.text;
    this.writer.end();
    if (this.player !== null) this.player.end();
    else if (record.sound !== null) this.text.before(played(record.sound, record.rate, "answer"));
    this.media.hidden = record.pictures.length === 0;
    const pictures = () => this.media.replaceChildren(...record.pictures.map((url, index) => picture(url, record, index)));
    if (record.pictures.length) whenNear(this.media, pictures);
    this.foot.replaceChildren(...this.actions(), el("span", { className: "num" }, facts(record)));
  }

  actions() {
    const { record } = this;
    const copy = button("Copy", () => copyWith(copy, record.text), { className: "quiet" }, icon("copy"));
    return [...(record.text ? [copy] : []), inspectButton(this.theirs, record, this.context)];
  }

  remove() {
    this.player?.pause();
    for (const element of this.elements) element.remove();
  }
}

function picture(url, record, index) {
  const image = attachments.view({ name: `picture-${index}.png`, type: "image/png", url });
  image.firstChild.alt = record.words;
  return image;
}

function facts({ seen, tokens, stopped }) {
  const parts = [stopped ? "stopped" : "", seen.word ? `first word ${seconds(seen.word)}` : ""];
  parts.push(seen.sound ? `first sound ${seconds(seen.sound)}` : "", tokens ? `${tokens} tokens` : "", seconds(seen.total));
  return parts.filter(Boolean).join(" \u00b7 ");
}
