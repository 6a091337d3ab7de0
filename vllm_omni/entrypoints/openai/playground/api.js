// The server's endpoints, its errors, and its server-sent events.

const KEY = "omni.key";

/** What the server said is wrong. `param` names the field of the request, where there is one. */
export class ApiError extends Error {
  constructor(error, status, retryAfter = null) {
    super(error.message);
    this.param = error.param ?? null;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** An error in words for people. */
export function explain(error) {
  if (!(error instanceof ApiError)) return "The server cannot be reached, or the connection broke. Is it still running?";
  if (error.status === 429) {
    const when = error.retryAfter === null ? "in a moment" : `in ${error.retryAfter} s`;
    return `The server is busy: ${error.message.replace(/; try again later$/, "")}. Try again ${when}.`;
  }
  if (error.status === 413) return `Too large: ${error.message}`;
  if (error.status === 503) return `The server cannot answer now: ${error.message}`;
  if (error.status >= 500) return `Something went wrong in the server: ${error.message}`;
  return error.message;
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);
export const hasKey = () => sessionStorage.getItem(KEY) !== null;

async function send(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key === null ? {} : { authorization: `Bearer ${key}` }) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  const text = await answer.text();
  let error = { message: `${answer.status} ${text || answer.statusText}` };
  try {
    error = JSON.parse(text).error ?? error;
  } catch {
    // Not the server's own answer: a proxy's, say. Its text is all there is.
  }
  throw new ApiError(error, answer.status, answer.headers.get("retry-after"));
}

/** The JSON at a path. */
export async function get(path) {
  return (await send(path, { cache: "no-store" })).json();
}

/** POST JSON text or a form; the JSON of the answer. */
export async function post(path, body) {
  dispatchEvent(new Event("omni-request"));
  return (await send(path, posted(body))).json();
}

/** The file at a path. */
export async function blob(path) {
  return (await send(path)).blob();
}

export const remove = (path) => send(path, { method: "DELETE" });

// A form says its type itself, with what separates its parts.
const posted = (body) => ({ method: "POST", body, headers: body instanceof FormData ? {} : { "content-type": "application/json" } });

/** POST JSON text or a form; yields the data of each server-sent event. Aborting `signal` cancels the request. */
export async function* stream(path, body, signal) {
  dispatchEvent(new Event("omni-request"));
  try {
    yield* events(path, body, signal);
  } finally {
    dispatchEvent(new Event("omni-request"));
  }
}

async function* events(path, body, signal) {
  const answer = await send(path, { ...posted(body), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let pieces = []; // of an event whose end has not come; joined once, as one with a picture comes in many
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const ends = value.includes("\n\n") || (value.startsWith("\n") && pieces.at(-1)?.endsWith("\n"));
    pieces.push(value);
    if (!ends) continue;
    const whole = pieces.join("").split("\n\n");
    pieces = [whole.pop()];
    for (const event of whole) {
      const line = event.split("\n").find((text) => text.startsWith("data: "));
      if (line === undefined || line === "data: [DONE]") continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new ApiError(data.error, answer.status);
      yield data;
    }
  }
}
