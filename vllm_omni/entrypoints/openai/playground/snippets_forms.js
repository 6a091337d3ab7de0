// Requests that are forms, because files go along: as curl commands and as Python.
import { blobOf, fileNames } from "./attachments.js";
import { call, json, python, quoted, savePictures } from "./snippets.js";

/** The body of such a request as the browser sends it; `field` holds the files. */
export function formOf(body, field, files) {
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) form.append(name, String(value));
  const names = fileNames(files);
  files.forEach((file, index) => form.append(files.length > 1 ? `${field}[]` : field, blobOf(file), names[index]));
  return form;
}

/** What the code reads where it runs, [name, bytes]. */
export const filesOf = (files) => fileNames(files).map((name, index) => [name, () => blobOf(files[index])]);

function curl(origin, path, body, field, files, withKey, after) {
  const names = fileNames(files);
  return [
    `curl -sS --fail-with-body ${quoted(`${origin}${path}`)} \\`,
    ...(withKey ? ['  -H "Authorization: Bearer $VLLM_API_KEY" \\'] : []),
    ...names.map((name) => `  -F ${quoted(`${field}${names.length > 1 ? "[]" : ""}=@${name}`)} \\`),
    ...Object.entries(body).map(([name, value]) => `  --form-string ${quoted(`${name}=${value}`)} \\`),
    `  ${after}`,
  ].join("\n");
}

const opened = (names) => names.map((name) => `open(${JSON.stringify(name)}, "rb")`);

// ---------------------------------------------------------------- edits

const OF_EDITS = new Set(["prompt", "model", "n", "size", "output_format"]);

/** Both write picture-0.png and so on. */
export function edits(origin, body, files, withKey) {
  const type = body.output_format ?? "png";
  const images = opened(fileNames(files));
  const after = `-o answer.json && python3 -c ${quoted(savePictures(type))}`;
  return {
    curl: () => curl(origin, "/v1/images/edits", body, "image", files, withKey, after),
    python: () =>
      python(
        ...[origin, withKey, ["base64"]],
        "answer = client.images.edit(",
        `    image=${images.length > 1 ? `[${images.join(", ")}]` : images[0]},`,
        ...call(body, OF_EDITS),
        ")",
        "for i, item in enumerate(answer.data):",
        `    with open(f"picture-{i}.${type}", "wb") as file:`,
        "        file.write(base64.b64decode(item.b64_json))",
      ),
  };
}

// ---------------------------------------------------------------- videos

const OF_VIDEOS = new Set(["prompt", "model", "size"]);

/** Both write video.mp4: the command waits for it in one request, the client asks for a job and how far it is. */
export function videos(origin, body, files, withKey) {
  const { seconds, ...rest } = body;
  const first = opened(fileNames(files)).map((file) => `    input_reference=${file},`);
  return {
    curl: () => curl(origin, "/v1/videos/sync", body, "input_reference", files, withKey, "-o video.mp4"),
    python: () =>
      python(
        ...[origin, withKey, []],
        "video = client.videos.create_and_poll(",
        ...first,
        ...call(rest, OF_VIDEOS),
        ...(seconds === undefined ? [] : [`    seconds=${json(String(seconds))},`]),
        ")",
        'if video.status != "completed":',
        "    raise SystemExit(video.error.message)",
        'client.videos.download_content(video.id).write_to_file("video.mp4")',
      ),
  };
}
