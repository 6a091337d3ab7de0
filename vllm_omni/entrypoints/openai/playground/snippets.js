// A request as JSON, as a curl command, and as Python.

/** JSON of a flat body. Written here because a seed may have more digits than a JavaScript number. */
export function toJson(body, indent = false) {
  const parts = Object.entries(body).map(([name, value]) => `${JSON.stringify(name)}: ${literal(value)}`);
  return indent ? `{\n  ${parts.join(",\n  ")}\n}` : `{${parts.join(", ")}}`;
}

const literal = (value) => (typeof value === "bigint" ? String(value) : JSON.stringify(value));
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A command for a POSIX shell with curl and python3; writes picture-0.png and so on. */
export function curl(origin, body, withKey) {
  const type = body.output_format ?? "png";
  const save =
    "import base64, json\n" +
    'for i, item in enumerate(json.load(open("answer.json"))["data"]):\n' +
    `    open(f"picture-{i}.${type}", "wb").write(base64.b64decode(item["b64_json"]))`;
  return [
    `curl -sS --fail-with-body ${quoted(`${origin}/v1/images/generations`)} \\`,
    "  -H 'Content-Type: application/json' \\",
    ...(withKey ? ['  -H "Authorization: Bearer $VLLM_API_KEY" \\'] : []),
    `  -d ${quoted(toJson(body, true))} \\`,
    `  -o answer.json && python3 -c ${quoted(save)}`,
  ].join("\n");
}

// Arguments that the openai client has; the others travel in extra_body.
const KNOWN = new Set(["prompt", "model", "n", "size", "output_format"]);

/** A Python program with the openai client; writes the same files. JSON's literals here are Python's too. */
export function python(origin, body, withKey) {
  const entries = Object.entries(body);
  const known = entries.filter(([name]) => KNOWN.has(name)).map(([name, value]) => `    ${name}=${literal(value)},`);
  const extra = Object.fromEntries(entries.filter(([name]) => !KNOWN.has(name)));
  const more = Object.keys(extra).length ? [`    extra_body=${toJson(extra)},`] : [];
  const key = withKey ? 'os.environ["VLLM_API_KEY"]' : '"none"';
  return [
    "import base64",
    ...(withKey ? ["import os"] : []),
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(`${origin}/v1`)}, api_key=${key})`,
    "answer = client.images.generate(",
    ...known,
    ...more,
    ")",
    "for i, item in enumerate(answer.data):",
    `    with open(f"picture-{i}.${body.output_format ?? "png"}", "wb") as file:`,
    "        file.write(base64.b64decode(item.b64_json))",
  ].join("\n");
}
