#!/usr/bin/env python3
"""Ask a server for a picture and show its steps.

Start the server first: vllm-omni serve MODEL
"""

import argparse
import base64
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--model", default=None, help="default: the one that the server has")
    parser.add_argument("--size", default="auto", help="WIDTHxHEIGHT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("picture.png"))
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = args.model or client.models.list().data[0].id
    events = client.images.generate(
        model=model, prompt=args.prompt, size=args.size, stream=True, extra_body={"seed": args.seed}
    )
    for event in events:
        if event.type == "image_generation.progress":
            print(f"step {event.step} of {event.total}")
        else:
            args.output.write_bytes(base64.b64decode(event.b64_json))
            print(f"{args.output}: {event.size}")


if __name__ == "__main__":
    main()
