#!/usr/bin/env python3
"""Ask an omni model something, with a picture and a sound if you like; it speaks the answer as it makes it.

Start the server first: vllm-omni serve Qwen/Qwen3-Omni-30B-A3B-Instruct
"""

import argparse
import base64
import time
import wave
from pathlib import Path
from typing import Any

from openai import OpenAI

RATE = 24000


def content_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The parts of the question."""
    parts: list[dict[str, Any]] = []
    if args.image is not None:
        url = f"data:image/{args.image.suffix[1:]};base64,{base64.b64encode(args.image.read_bytes()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    if args.audio is not None:
        sound = {"data": base64.b64encode(args.audio.read_bytes()).decode(), "format": args.audio.suffix[1:]}
        parts.append({"type": "input_audio", "input_audio": sound})
    return [*parts, {"type": "text", "text": args.question}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--audio", type=Path)
    parser.add_argument("--voice", default="Ethan")
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--output", type=Path, default=Path("answer.wav"))
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    begun = time.monotonic()
    stream: Any = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content_of(args)}],  # type: ignore[list-item, misc]
        modalities=["text", "audio"],
        audio={"voice": args.voice, "format": "pcm16"},
        stream=True,
    )
    with wave.open(str(args.output), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        for chunk in stream:
            audio = chunk.choices[0].delta.model_dump().get("audio") or {}
            print(audio.get("transcript") or "", end="", flush=True)
            if audio.get("data"):
                if file.getnframes() == 0:
                    print(f" [first sound after {time.monotonic() - begun:.2f} s] ", end="", flush=True)
                file.writeframes(base64.b64decode(audio["data"]))
        print(f"\n{args.output}: {file.getnframes() / RATE:.1f} s")


if __name__ == "__main__":
    main()
