// Requests as JSON, as curl commands, and as Python.

/** A file that the code reads where it runs; stands in a body in place of its data. */
export class FileData {
  constructor(name, type) {
    [this.name, this.type] = [name, type];
  }
}

/** JSON of a flat body. Written here because a seed may have more digits than a JavaScript number. */
export function toJson(body, indent = false) {
  const parts = Object.entries(body).map(([name, value]) => `${JSON.stringify(name)}: ${json(value, indent ? 1 : null)}`);
  return indent ? `{\n  ${parts.join(",\n  ")}\n}` : `{${parts.join(", ")}}`;
}

// As JSON.stringify does, but for what it does not know: big integers, and files (as `file` writes them).
export function json(value, depth, file = null) {
  if (typeof value === "bigint") return String(value);
  if (value instanceof FileData) return file(value);
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const list = Array.isArray(value);
  const inner = depth === null ? null : depth + 1;
  const parts = Object.entries(value).map(([name, part]) => `${list ? "" : `${JSON.stringify(name)}: `}${json(part, inner, file)}`);
  const [open, close] = list ? "[]" : "{}";
  const flat = `${open}${parts.join(", ")}${close}`;
  if (depth === null || flat.length < 90) return flat;
  const space = "  ".repeat(inner);
  return `${open}\n${space}${parts.join(`,\n${space}`)}\n${"  ".repeat(depth)}${close}`;
}

export const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function head(origin, path, withKey, options) {
  return [
    `curl -sS ${options} ${quoted(`${origin}${path}`)} \\`,
    "  -H 'Content-Type: application/json' \\",
    ...(withKey ? ['  -H "Authorization: Bearer $VLLM_API_KEY" \\'] : []),
  ];
}

export function python(origin, withKey, imports, ...lines) {
  const key = withKey ? 'os.environ["VLLM_API_KEY"]' : '"none"';
  return [
    ...[...imports, ...(withKey ? ["os"] : [])].sort().map((name) => `import ${name}`),
    ...(imports.length || withKey ? [""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(`${origin}/v1`)}, api_key=${key})`,
    ...lines,
  ].join("\n");
}

// Arguments of a call: those that the client has; the others travel in extra_body. JSON's literals are Python's, too, but
// for the three words, which stand alone.
export function call(body, known, file = null) {
  const literal = (value) => ({ true: "True", false: "False", null: "None" })[String(value)] ?? json(value, 2, file);
  const entries = Object.entries(body);
  const extra = Object.fromEntries(entries.filter(([name]) => !known.has(name)));
  return [
    ...entries.filter(([name]) => known.has(name)).map(([name, value]) => `    ${name}=${literal(value)},`),
    ...(Object.keys(extra).length ? [`    extra_body=${json(extra, null)},`] : []),
  ];
}

// ---------------------------------------------------------------- pictures

const OF_PICTURES = new Set(["prompt", "model", "n", "size", "output_format"]);

/** The program that takes the pictures out of answer.json. */
export const savePictures = (type) =>
  "import base64, json\n" +
  'for i, item in enumerate(json.load(open("answer.json"))["data"]):\n' +
  `    open(f"picture-{i}.${type}", "wb").write(base64.b64decode(item["b64_json"]))`;

/** Both write picture-0.png and so on. The command needs a POSIX shell with curl and python3. */
export function pictures(origin, body, withKey) {
  const type = body.output_format ?? "png";
  return {
    curl: () =>
      [
        ...head(origin, "/v1/images/generations", withKey, "--fail-with-body"),
        `  -d ${quoted(toJson(body, true))} \\`,
        `  -o answer.json && python3 -c ${quoted(savePictures(type))}`,
      ].join("\n"),
    python: () =>
      python(
        ...[origin, withKey, ["base64"]],
        "answer = client.images.generate(",
        ...call(body, OF_PICTURES),
        ")",
        "for i, item in enumerate(answer.data):",
        `    with open(f"picture-{i}.${type}", "wb") as file:`,
        "        file.write(base64.b64decode(item.b64_json))",
      ),
  };
}

// ---------------------------------------------------------------- chats

const OF_CHATS = new Set(["model", "messages", "modalities", "audio", "max_completion_tokens", "temperature", "top_p", "seed", "stream"]);

/** `body` is of a stream. Spoken answers are written to answer.wav, drawn ones to picture-0.png and so on. */
export function chats(origin, body, withKey, { draws = false, compat = "openai" }) {
  const form = { draws, spoken: compat === "upstream" ? UPSTREAM : OPENAI };
  return { curl: () => chatCurl(origin, body, withKey, form), python: () => chatPython(origin, body, withKey, form) };
}

// How a chunk of a spoken answer is read: [in the command, by the client].
const OPENAI = [
  `            audio = choice["delta"].get("audio") or {}
            print(audio.get("transcript", ""), end="", flush=True)
            file.writeframes(base64.b64decode(audio.get("data", "")))`,
  `        audio = chunk.choices[0].delta.model_dump().get("audio") or {}
        print(audio.get("transcript") or "", end="", flush=True)
        file.writeframes(base64.b64decode(audio.get("data") or ""))`,
];
const UPSTREAM = [
  `            text = choice["delta"].get("content") or ""
            if chunk.get("modality") == "audio":
                file.writeframes(base64.b64decode(text))
            else:
                print(text, end="", flush=True)`,
  `        text = chunk.choices[0].delta.content or ""
        if chunk.model_dump().get("modality") == "audio":
            file.writeframes(base64.b64decode(text))
        else:
            print(text, end="", flush=True)`,
];

const spokenCommand = (read) => `import base64, json, sys, wave
with wave.open("answer.wav", "wb") as file:
    file.setparams((1, 2, 24000, 0, "NONE", ""))
    for line in sys.stdin:
        chunk = json.loads(line[6:]) if line.startswith("data: {") else {}
        for choice in chunk.get("choices", []):
${read}`;
const DRAWN = `import base64, json
parts = json.load(open("answer.json"))["choices"][0]["message"]["content"]
for i, part in enumerate(parts):
    data = part["image_url"]["url"].split(",")[1]
    open(f"picture-{i}.png", "wb").write(base64.b64decode(data))`;

function chatCurl(origin, { stream, ...rest }, withKey, { draws, spoken }) {
  const body = draws ? rest : { ...rest, stream };
  const after = draws ? `-o answer.json && python3 -c ${quoted(DRAWN)}` : body.audio ? `| python3 -c ${quoted(spokenCommand(spoken[0]))}` : "";
  const first = head(origin, "/v1/chat/completions", withKey, draws ? "--fail-with-body" : "--fail-with-body --no-buffer");
  const files = [];
  const file = ({ name, type }) => {
    files.push(name);
    return `"data:${type};base64,\u0000${name}\u0000"`;
  };
  const text = json(body, 0, file);
  if (files.length === 0) return [...first, `  -d ${quoted(text)}${after ? ` ${after.startsWith("|") ? "" : "\\\n  "}${after}` : ""}`].join("\n");
  // The shell puts the files in: within << JSON it reads $, ` and \, so those of the text are escaped.
  const shell = text.replace(/[\\$`]/g, "\\$&").replace(/\0(.*?)\0/g, (_, name) => `$(base64 < ${name} | tr -d '\\n')`);
  return [...first, `  --data-binary @- << JSON ${after}`.trimEnd(), shell, "JSON"].join("\n");
}

function chatPython(origin, { stream, ...rest }, withKey, { draws, spoken }) {
  const body = draws ? rest : { ...rest, stream };
  let reads = false;
  const file = ({ name, type }) => {
    reads = true;
    return `data_url(${JSON.stringify(name)}, ${JSON.stringify(type)})`;
  };
  const asked = [`${draws ? "answer" : "stream"} = client.chat.completions.create(`, ...call(body, OF_CHATS, file), ")"];
  const reader = [
    "",
    "",
    "def data_url(path, kind):",
    '    with open(path, "rb") as file:',
    '        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"',
    "",
    "",
  ];
  const imports = [...(reads || draws || body.audio ? ["base64"] : []), ...(body.audio ? ["wave"] : [])];
  return python(origin, withKey, imports, ...(reads ? reader : []), ...asked, draws ? PICTURES : body.audio ? speechProgram(spoken[1]) : TEXT);
}

const TEXT = `for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()`;
const speechProgram = (read) => `with wave.open("answer.wav", "wb") as file:
    file.setparams((1, 2, 24000, 0, "NONE", ""))
    for chunk in stream:
${read}
print()`;
const PICTURES = `for i, part in enumerate(answer.choices[0].message.content):
    data = part["image_url"]["url"].split(",")[1]
    with open(f"picture-{i}.png", "wb") as file:
        file.write(base64.b64decode(data))`;

// ---------------------------------------------------------------- speech

const OF_SPEECH = new Set(["model", "input", "voice", "instructions", "response_format"]);

/** Both write speech.wav. */
export function speech(origin, body, withKey) {
  return {
    curl: () => [...head(origin, "/v1/audio/speech", withKey, "--fail-with-body"), `  -d ${quoted(toJson(body, true))} \\`, "  -o speech.wav"].join("\n"),
    python: () =>
      python(
        ...[origin, withKey, []],
        "with client.audio.speech.with_streaming_response.create(",
        ...call({ ...body, voice: body.voice ?? null }, OF_SPEECH), // the client wants one; null is the model's own
        ") as answer:",
        '    answer.stream_to_file("speech.wav")',
      ),
  };
}
