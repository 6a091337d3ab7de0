"""Ask Qwen3-Omni about a picture, a sound or a video, read and hear its answer.

python end2end.py --model Qwen/Qwen3-Omni-30B-A3B-Instruct "How does a rainbow come about?"
python end2end.py --model ... --image photo.jpg --audio question.wav --speaker Chelsie "Answer the question."
python end2end.py --model ... --modalities text "One word is enough."          # no speech is made
"""

import argparse
import wave
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoProcessor
from vllm.multimodal.media import MediaConnector
from vllm.multimodal.media.audio import load_audio

from vllm_omni import Omni

SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--model", required=True, help="folder or name of the checkpoint")
    parser.add_argument("--image", type=Path, action="append", default=[], help="file of a picture")
    parser.add_argument("--audio", type=Path, action="append", default=[], help="file of a sound")
    parser.add_argument("--video", type=Path, action="append", default=[], help="file of a video")
    parser.add_argument("--speaker", default="Ethan", help="voice of the answer")
    parser.add_argument("--modalities", nargs="+", default=["text", "audio"], choices=["text", "audio"])
    parser.add_argument("--stage-configs-path", help="stages (default: all on one GPU)")
    parser.add_argument("--output", type=Path, default=Path("answer.wav"), help="where the answer's sound goes")
    return parser.parse_args()


def load_media(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Decode the files; of videos one frame a second, which is what the model's positions assume."""
    files = MediaConnector({"video": {"fps": 1, "num_frames": -1}}, allowed_local_media_path="/")
    media = {
        "image": [files.fetch_image(path.resolve().as_uri()) for path in args.image],
        "audio": [load_audio(path, sr=16000) for path in args.audio],
        "video": [files.fetch_video(path.resolve().as_uri())[0] for path in args.video],
    }
    return {kind: items for kind, items in media.items() if items}


def make_prompt(args: argparse.Namespace) -> dict[str, Any]:
    media = load_media(args)
    content = [{"type": kind} for kind, items in media.items() for _ in items]
    turns = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": [*content, {"type": "text", "text": args.question}]},
    ]
    processor = AutoProcessor.from_pretrained(args.model)
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return {"prompt": text, "multi_modal_data": media, "additional_information": {"speaker": args.speaker}}


def main() -> None:
    args = parse_arguments()
    prompt = make_prompt(args)
    with Omni(args.model, stage_configs_path=args.stage_configs_path) as omni:
        for output in omni.generate(prompt, output_modalities=args.modalities):
            if output.final_output_type == "text":
                print(output.outputs[0].text)
            else:
                sound = output.multimodal_output
                with wave.open(str(args.output), "wb") as file:
                    file.setparams((1, 2, sound["sr"], 0, "NONE", ""))
                    file.writeframes((np.asarray(sound["audio"]) * 32767).astype(np.int16).tobytes())
                print(f"{args.output}: {len(sound['audio']) / sound['sr']:.2f} s")


if __name__ == "__main__":
    main()
