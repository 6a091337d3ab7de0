// Plays sound while it comes, without a gap between the pieces, and draws its waveform. Afterwards it can be played
// again from anywhere and saved.
import { button, clock, el, icon, saveAs, whenNear } from "./dom.js";
import { wav } from "./sound.js";

const LEAD_S = 0.06; // between asking for sound and its start, so that the next piece is there in time
const BIN = 256; // samples a peak
const BAR = 4; // pixels, with the space between
const contexts = new Map(); // by rate: at the sound's own rate nothing is resampled, so pieces fit to the sample
const resized = new ResizeObserver((entries) => entries.forEach((entry) => entry.target.player.refresh()));
let sounding = null; // one at a time

/** The audio context of a rate. Call it first on a click or key, as browsers ask for. */
export function wake(rate) {
  if (!contexts.has(rate)) contexts.set(rate, new AudioContext({ sampleRate: rate }));
  const context = contexts.get(rate);
  context.resume();
  return context;
}

/** Samples that grow; room is doubled, so that each is copied a few times at most. */
class Growing {
  constructor(Kind) {
    this.room = new Kind(4096);
    this.length = 0;
  }

  push(values) {
    const needed = this.length + values.length;
    if (needed > this.room.length) {
      const more = new this.room.constructor(Math.max(needed, 2 * this.room.length));
      more.set(this.room.subarray(0, this.length));
      this.room = more;
    }
    this.room.set(values, this.length);
    this.length = needed;
  }

  slice(from = 0, to = this.length) {
    return this.room.subarray(from, to);
  }
}

export class Player {
  constructor(rate, name) {
    this.rate = rate;
    this.sound = new Growing(Int16Array);
    this.peaks = new Growing(Float32Array);
    this.whole = false; // no more pieces come
    this.playing = false;
    this.position = 0; // in samples, while it is not playing
    this.scheduled = 0; // samples up to here have been given to the context
    this.origin = 0; // when, in the context's time, sample 0 sounds
    this.sources = new Set();
    this.frame = null;
    this.toggle = button("", () => (this.playing ? this.pause() : this.play()), { className: "round" });
    this.canvas = el("canvas", { role: "slider", tabIndex: 0, "aria-label": "Waveform", "aria-valuemin": "0" });
    this.canvas.player = this;
    this.canvas.addEventListener("click", (event) => this.seek(event.offsetX / this.canvas.clientWidth));
    this.canvas.addEventListener("keydown", (event) => this.pressed(event));
    this.time = el("span", { className: "num" });
    this.save = button("Save", () => saveAs(this.file(), `${name}.wav`), { className: "quiet" }, icon("down"));
    this.save.hidden = true;
    this.element = el("div", { className: "sound" }, this.toggle, this.canvas, this.time, this.save);
    resized.observe(this.canvas);
    this.label();
  }

  /** Take one more piece of 16-bit samples; it is heard as soon as those before it have been. */
  add(samples) {
    const from = this.sound.length;
    this.sound.push(samples);
    const known = this.peaks.length && from % BIN ? this.peaks.length - 1 : this.peaks.length;
    this.peaks.length = known; // the last one may have been of fewer samples
    const peaks = [];
    for (let at = known * BIN; at < this.sound.length; at += BIN) {
      let peak = 0;
      for (const value of this.sound.slice(at, Math.min(at + BIN, this.sound.length))) peak = Math.max(peak, Math.abs(value));
      peaks.push(peak / 32768);
    }
    this.peaks.push(peaks);
    if (this.playing) this.schedule();
    this.refresh();
  }

  /** No more pieces come. */
  end() {
    this.whole = true;
    this.save.hidden = this.sound.length === 0;
    if (this.playing && this.sources.size === 0) this.halt(0);
    this.refresh();
  }

  file() {
    return new Blob([wav(this.sound.slice(), this.rate)], { type: "audio/wav" });
  }

  play(from = this.position) {
    if (sounding !== this) sounding?.pause();
    sounding = this;
    wake(this.rate);
    this.playing = true;
    this.position = this.scheduled = this.whole && from >= this.sound.length ? 0 : from;
    this.origin = -Infinity;
    this.schedule();
    this.label();
    this.refresh();
  }

  schedule() {
    const samples = this.sound.slice(this.scheduled);
    if (samples.length === 0) return;
    const context = wake(this.rate);
    const earliest = context.currentTime + (this.sources.size ? 0 : LEAD_S);
    if (this.origin + this.scheduled / this.rate < earliest) {
      // The first piece, or one that came too late. On a whole sample, as between samples it would be blurred.
      this.origin = (Math.ceil(earliest * this.rate) - this.scheduled) / this.rate;
    }
    const buffer = context.createBuffer(1, samples.length, this.rate);
    buffer.copyToChannel(Float32Array.from(samples, (value) => value / 32768), 0);
    const source = new AudioBufferSourceNode(context, { buffer });
    source.connect(context.destination);
    source.start(this.origin + this.scheduled / this.rate);
    this.scheduled += samples.length;
    this.sources.add(source);
    source.addEventListener("ended", () => {
      this.sources.delete(source);
      if (this.playing && this.whole && this.sources.size === 0) this.halt(0);
    });
  }

  /** Sample that is heard now. */
  now() {
    if (!this.playing) return this.position;
    if (this.scheduled === this.position) return this.position;
    const heard = Math.round((wake(this.rate).currentTime - this.origin) * this.rate);
    return Math.max(this.position, Math.min(heard, this.scheduled));
  }

  pause() {
    this.halt(this.now());
  }

  halt(position) {
    this.playing = false;
    this.position = position;
    const sources = [...this.sources];
    this.sources.clear();
    for (const source of sources) source.stop();
    this.label();
    this.refresh();
  }

  seek(part) {
    const position = Math.round(Math.max(0, Math.min(1, part)) * this.sound.length);
    const was = this.playing;
    this.halt(position);
    if (was) this.play(position);
  }

  pressed(event) {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    const length = this.sound.length || 1;
    if (step !== undefined) this.seek((this.now() + step * this.rate) / length);
    else if (event.key === "Home") this.seek(0);
    else if (event.key === "End") this.seek(1);
    else if (event.key === " ") this.toggle.click();
    else return;
    event.preventDefault();
  }

  label() {
    this.toggle.replaceChildren(icon(this.playing ? "pause" : "play"));
    this.toggle.setAttribute("aria-label", this.playing ? "Pause" : "Play");
    this.element.dataset.state = this.playing ? "playing" : "quiet";
  }

  /** Draw soon; again and again while it plays. */
  refresh() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
      if (this.playing && this.canvas.isConnected) this.refresh();
    });
  }

  draw() {
    const { canvas, peaks } = this;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (width === 0) return;
    const scale = devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * scale)) [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const style = getComputedStyle(canvas);
    const [heard, unheard] = [style.color, style.caretColor];
    const bars = Math.max(1, Math.floor(width / BAR));
    const done = this.sound.length ? (this.now() / this.sound.length) * bars : 0;
    const all = peaks.slice();
    for (let bar = 0; bar < bars; bar++) {
      const from = Math.floor((bar * all.length) / bars);
      let peak = 0;
      for (const value of all.subarray(from, Math.max(from + 1, Math.floor(((bar + 1) * all.length) / bars)))) peak = Math.max(peak, value);
      const tall = Math.max(2, Math.sqrt(peak) * (height - 4));
      pen.fillStyle = bar < done ? heard : unheard;
      pen.fillRect(bar * BAR, (height - tall) / 2, BAR - 1.5, tall);
    }
    const [at, length] = [this.now() / this.rate, this.sound.length / this.rate];
    this.time.textContent = `${clock(at)} / ${clock(length)}`;
    canvas.setAttribute("aria-valuemax", length.toFixed(1));
    canvas.setAttribute("aria-valuenow", at.toFixed(1));
    canvas.setAttribute("aria-valuetext", `${at.toFixed(1)} of ${length.toFixed(1)} seconds`);
  }
}

/** A player of whole sound; it is made when it comes near, so that long lists stay light. */
export function played(samples, rate, name) {
  const place = el("div", { className: "sound-place" });
  whenNear(place, () => {
    const player = new Player(rate, name);
    player.add(samples);
    player.end();
    place.replaceWith(player.element);
  });
  return place;
}
