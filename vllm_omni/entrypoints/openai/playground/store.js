// What the page keeps in IndexedDB; in memory where the browser has none to give (some private windows).

const STORES = ["runs", "turns", "clips", "films"];
let opening = null;

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

function database() {
  opening ??= (async () => {
    try {
      const request = indexedDB.open("omni-playground", 3);
      request.onupgradeneeded = () => {
        const has = request.result.objectStoreNames;
        for (const name of STORES) if (!has.contains(name)) request.result.createObjectStore(name, { keyPath: "id" });
      };
      const made = await settled(request);
      made.onversionchange = () => made.close(); // a newer page in another tab
      return made;
    } catch {
      return null;
    }
  })();
  return opening;
}

async function store(name, mode) {
  return (await database())?.transaction(name, mode).objectStore(name) ?? null;
}

/** A name that nothing else has. */
export const newId = () => crypto.getRandomValues(new Uint32Array(4)).join("-");

/** Whether what is kept outlives the page. */
export const lasting = async () => (await database()) !== null;

/** All records of a store, oldest first. Each has `id` and `at`. */
export async function all(name) {
  const records = await store(name, "readonly");
  if (records === null) return [];
  return (await settled(records.getAll())).sort((a, b) => a.at - b.at);
}

/** Keep a record. Returns false when the browser has no room for it. */
export async function keep(name, record) {
  const records = await store(name, "readwrite");
  if (records === null) return true;
  try {
    await settled(records.put(record));
    return true;
  } catch {
    return false;
  }
}

export async function remove(name, id) {
  const records = await store(name, "readwrite");
  if (records !== null) await settled(records.delete(id));
}

export async function clear(name) {
  const records = await store(name, "readwrite");
  if (records !== null) await settled(records.clear());
}
