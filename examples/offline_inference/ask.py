"""What the examples of the omni models share: files become a prompt, the answer is printed and its sound written."""

from __future__ import annotations

import argparse
import wave
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoProcessor
from vllm.multimodal.media import MediaConnector

from vllm_omni import Omni

SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)
"""Qwen2.5-Omni speaks well with this system prompt only."""


def parse_arguments(usage: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--model", required=True, help="folder or name of the checkpoint")
    for kind in ("image", "audio", "video"):
        parser.add_argument(f"--{kind}", type=Path, action="append", default=[], help=f"{kind} file; may be repeated")
    parser.add_argument("--speaker", help="voice of the answer (default: the model's)")
    parser.add_argument("--modalities", nargs="+", default=["text", "audio"], choices=["text", "audio"])
    parser.add_argument("--stage-configs-path", help="stages (default: all on one GPU)")
    parser.add_argument("--output", type=Path, default=Path("answer.wav"), help="where the answer's sound goes")
    return parser.parse_args()


def load_media(args: argparse.Namespace, fps: int) -> dict[str, list[Any]]:
    """Decode the files; of videos ``fps`` frames a second."""
    media = MediaConnector({"video": {"fps": fps, "num_frames": -1}}, allowed_local_media_path="/")
    fetch = {"image": media.fetch_image, "audio": media.fetch_audio, "video": lambda url: media.fetch_video(url)[0]}
    files = {kind: [path.resolve().as_uri() for path in getattr(args, kind)] for kind in fetch}
    return {kind: [fetch[kind](url) for url in urls] for kind, urls in files.items() if urls}


def make_prompt(args: argparse.Namespace, fps: int) -> dict[str, Any]:
    """The question with its files, as the model's chat template writes them."""
    media = load_media(args, fps)
    content = [{"type": kind} for kind, items in media.items() for _ in items]
    turns = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": [*content, {"type": "text", "text": args.question}]},
    ]
    processor = AutoProcessor.from_pretrained(args.model)
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    voice = {"additional_information": {"speaker": args.speaker}} if args.speaker else {}
    return {"prompt": text, "multi_modal_data": media, **voice}


def answer(omni: Omni, args: argparse.Namespace, fps: int) -> None:
    """Ask ``omni``, print the text, write the sound."""
    for output in omni.generate(make_prompt(args, fps), output_modalities=args.modalities):
        if output.final_output_type == "text":
            print(output.outputs[0].text)
        else:
            sound = output.multimodal_output
            with wave.open(str(args.output), "wb") as file:
                file.setparams((1, 2, sound["sr"], 0, "NONE", ""))
                file.writeframes((np.asarray(sound["audio"]) * 32767).astype(np.int16).tobytes())
            print(f"{args.output}: {len(sound['audio']) / sound['sr']:.2f} s")


def main(usage: str, fps: int) -> None:
    """One example: text of ``--help``, frames a second that the model's positions assume of videos."""
    args = parse_arguments(usage)
    with Omni(args.model, stage_configs_path=args.stage_configs_path) as omni:
        answer(omni, args, fps)
