// Sound in and out: a player of PCM pieces as they come, its waveform, WAV files, and the microphone.
import { el, seconds } from "./dom.js";

const RATE = 24000; // of the pcm16 that chats stream
const MICROPHONE_RATE = 16000;
const BARS = 240;
let context = null;

/** The page's audio context; made on a click, as browsers ask for. */
export function wake() {
  context ??= new AudioContext();
  context.resume();
  return context;
}

export const fromBase64 = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

export function toBase64(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}

/** A WAV file of mono samples in [-1, 1]. */
export function wav(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const word = (at, text) => [...text].forEach((letter, index) => view.setUint8(at + index, letter.charCodeAt(0)));
  word(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  word(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  word(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, index) => view.setInt16(44 + 2 * index, Math.round(32767 * Math.max(-1, Math.min(1, value))), true));
  return new Uint8Array(view.buffer);
}

/** Plays pieces one after the other as they come; afterwards the whole can be played again and saved. */
export class Player {
  constructor() {
    this.pieces = [];
    this.length = 0;
    this.next = 0;
    this.sources = new Set();
    this.canvas = el("canvas", { width: 2 * BARS, height: 88, role: "img" });
    this.time = el("span", { className: "num" });
    this.button = el("button", { type: "button" }, "Stop");
    this.link = el("a", { download: "answer.wav", hidden: true }, "Save");
    this.button.addEventListener("click", () => (this.sources.size ? this.stop() : this.play(this.whole())));
    this.element = el("div", { className: "sound" }, this.button, this.canvas, this.time, this.link);
  }

  /** Take one more piece of little-endian 16-bit samples. */
  add(bytes) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength - (bytes.byteLength % 2));
    const samples = Float32Array.from({ length: view.byteLength / 2 }, (_, index) => view.getInt16(2 * index, true) / 32768);
    if (samples.length === 0) return;
    this.pieces.push(samples);
    this.length += samples.length;
    this.play(samples);
    this.draw();
  }

  whole() {
    const all = new Float32Array(this.length);
    let at = 0;
    for (const piece of this.pieces) {
      all.set(piece, at);
      at += piece.length;
    }
    return all;
  }

  play(samples) {
    const buffer = wake().createBuffer(1, samples.length, RATE);
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(context, { buffer });
    source.connect(context.destination);
    this.next = Math.max(this.next, context.currentTime + 0.05);
    source.start(this.next);
    this.next += buffer.duration;
    this.sources.add(source);
    this.button.textContent = "Stop";
    source.addEventListener("ended", () => {
      this.sources.delete(source);
      if (this.sources.size === 0) this.button.textContent = "Play";
    });
  }

  stop() {
    for (const source of this.sources) source.stop();
    this.next = 0;
  }

  draw() {
    const all = this.whole();
    const pen = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    pen.clearRect(0, 0, width, height);
    pen.fillStyle = getComputedStyle(this.canvas).color;
    const span = Math.max(1, Math.ceil(all.length / BARS));
    for (let bar = 0; bar * span < all.length; bar++) {
      let peak = 0;
      for (const value of all.subarray(bar * span, (bar + 1) * span)) peak = Math.max(peak, Math.abs(value));
      const tall = Math.max(2, peak * height);
      pen.fillRect((bar * width) / BARS, (height - tall) / 2, width / BARS - 0.6, tall);
    }
    this.time.textContent = seconds(all.length / RATE);
    this.canvas.setAttribute("aria-label", `Waveform, ${this.time.textContent}`);
  }

  /** No more pieces come. */
  end() {
    this.link.href = URL.createObjectURL(new Blob([wav(this.whole(), RATE)], { type: "audio/wav" }));
    this.link.hidden = false;
  }
}

/** Records from the microphone; `stop` gives a WAV file. */
export async function record() {
  if (!navigator.mediaDevices) throw new Error("the microphone needs https or localhost");
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const recorder = new MediaRecorder(stream);
  const parts = [];
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  const ended = new Promise((resolve) => recorder.addEventListener("stop", resolve));
  recorder.start();
  return {
    async stop() {
      recorder.stop();
      await ended;
      for (const track of stream.getTracks()) track.stop();
      const decoder = new OfflineAudioContext(1, 1, MICROPHONE_RATE);
      const decoded = await decoder.decodeAudioData(await new Blob(parts).arrayBuffer());
      return wav(decoded.getChannelData(0), MICROPHONE_RATE);
    },
  };
}
