// The server's endpoints, its errors, and its server-sent events.

const KEY = "omni.key";

/** What the server said is wrong. `param` names the field of the request, where there is one. */
export class ApiError extends Error {
  constructor(error, status) {
    super(error.message);
    this.param = error.param ?? null;
    this.status = status;
  }
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
  throw new ApiError(error, answer.status);
}

/** The JSON at a path. */
export async function get(path) {
  return (await send(path, { cache: "no-store" })).json();
}

/** POST JSON text; yields the data of each server-sent event. Aborting `signal` cancels the request. */
export async function* stream(path, json, signal) {
  const headers = { "content-type": "application/json" };
  const answer = await send(path, { method: "POST", headers, body: json, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((text) => text.startsWith("data: "));
      if (line === undefined || line === "data: [DONE]") continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new ApiError(data.error, answer.status);
      yield data;
    }
  }
}
