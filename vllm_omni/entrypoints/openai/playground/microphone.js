// Records from the microphone.
import { quantised, wav } from "./sound.js";

const RATE = 16000; // what speech models hear

/** Start; `onLevel` is told the loudness, 0 to 1, of each moment. `stop` gives a WAV file, `cancel` nothing. */
export async function record(onLevel) {
  if (!navigator.mediaDevices) throw new Error("A browser gives the microphone only to pages from https or localhost.");
  const stream = await listen();
  const recorder = new MediaRecorder(stream);
  const parts = [];
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  const ended = new Promise((resolve) => recorder.addEventListener("stop", resolve));
  const meter = measure(stream, onLevel);
  recorder.start();
  const finish = async () => {
    recorder.stop();
    await ended;
    await meter.close();
    for (const track of stream.getTracks()) track.stop();
  };
  return {
    cancel: finish,
    async stop() {
      await finish();
      const decoder = new OfflineAudioContext(1, 1, RATE);
      const decoded = await decoder.decodeAudioData(await new Blob(parts).arrayBuffer());
      return wav(quantised(decoded.getChannelData(0)), RATE);
    },
  };
}

async function listen() {
  try {
    return await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    const said = { NotAllowedError: "The browser was told not to give the microphone to this page.", NotFoundError: "There is no microphone." };
    throw new Error(said[error.name] ?? `The microphone does not work: ${error.message}`);
  }
}

function measure(stream, onLevel) {
  const context = new AudioContext();
  const analyser = new AnalyserNode(context, { fftSize: 1024 });
  context.createMediaStreamSource(stream).connect(analyser);
  const moment = new Float32Array(analyser.fftSize);
  let open = true;
  const look = () => {
    if (!open) return;
    analyser.getFloatTimeDomainData(moment);
    onLevel(moment.reduce((most, value) => Math.max(most, Math.abs(value)), 0));
    requestAnimationFrame(look);
  };
  look();
  return {
    close() {
      open = false;
      return context.close();
    },
  };
}
