// Finished pictures in IndexedDB; in memory where the browser has none to give (some private windows).

const LIMIT = 200;
let database = null;

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** Open it; returns the runs, newest first, and whether they outlive the page. */
export async function open() {
  try {
    const opening = indexedDB.open("omni-playground", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("runs", { keyPath: "id" });
    database = await settled(opening);
    const runs = await settled(store("readonly").getAll());
    return { runs: runs.sort((a, b) => b.at - a.at), lasting: true };
  } catch {
    database = null;
    return { runs: [], lasting: false };
  }
}

const store = (mode) => database.transaction("runs", mode).objectStore("runs");

/** Keep a run. Returns false when the browser has no room for it. */
export async function keep(run) {
  if (database === null) return true;
  try {
    await settled(store("readwrite").put(run));
    return true;
  } catch {
    return false;
  }
}

export async function remove(id) {
  if (database !== null) await settled(store("readwrite").delete(id));
}

export async function clear() {
  if (database !== null) await settled(store("readwrite").clear());
}

/** Ids of the oldest runs beyond the limit; `runs` is sorted newest first. */
export const beyondLimit = (runs) => runs.slice(LIMIT).map((run) => run.id);

/** A small picture for the gallery; the picture itself when it is small. */
export async function thumbnail(blob) {
  const SIDE = 256;
  const bitmap = await createImageBitmap(blob);
  const scale = SIDE / Math.min(bitmap.width, bitmap.height);
  if (scale >= 0.8) return blob;
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return new Promise((resolve) => canvas.toBlob((small) => resolve(small ?? blob), "image/webp", 0.85));
}
