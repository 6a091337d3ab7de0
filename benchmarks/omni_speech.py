"""W6, speech from text: Qwen2.5-Omni-7B or Qwen3-Omni-30B-A3B in full size with random weights and fixed lengths.

Parts, each in a process of its own with a time limit; results are written as they come, so that a part that hangs or
fails costs only itself:

    serve         our stages (``AsyncOmni``) under closed loops of clients, text-only requests in turns with plain vLLM
                  on the same thinker, and with ``--trace`` a profile of the stages that speak
    transformers  transformers' own ``generate``, one request at a time

Lengths are prompt tokens / answer tokens / codec frames. Times: TTFT to the first token, TTFP to the first piece of
sound at the caller, TPOT a token of text, job to the end of sound, RTF job over length of the sound.

    python benchmarks/omni_speech.py --model qwen2_5 --gpus 1 --json out.json
    python benchmarks/omni_speech.py --model qwen3 --gpus 2 --json out.json --trace
    python benchmarks/omni_speech.py --model qwen3 --tiny --json out.json       everything on a CPU, tiny sizes
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHAPES = ["100/25/90", "100/100/360", "2500/900/3240@1,8"]
TINY_SHAPES = ["24/6/16", "40/12/30"]


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["qwen2_5", "qwen3"], required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True, help="results; logs are written beside it")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--parts", nargs="+", default=["serve", "transformers"])
    parser.add_argument("--shapes", nargs="+", help="prompt/answer/frames, or prompt/answer/frames@clients,clients")
    parser.add_argument("--reference-shapes", nargs="+", help="the same, for transformers; default: the first shape")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--waves", type=int, default=2, help="requests a client in a cell")
    parser.add_argument("--turns", type=int, default=1, help="times that ours, plain, plain, ours is run")
    parser.add_argument("--text-limit", type=int, default=200, help="tokens of a text-only answer")
    parser.add_argument(
        "--plain",
        choices=["beside", "late", "after", "none"],
        default="beside",
        help="plain vLLM starts with our stages, once speech is measured, or when our stages have ended",
    )
    parser.add_argument("--mps", action="store_true", help="our stages under MPS (gpu_sharing); plain vLLM is outside")
    parser.add_argument("--kv-gib", nargs=2, type=float, help="KV cache of thinker and talker")
    parser.add_argument("--eager", nargs="+", type=int, default=[], help="stages without compilation and graphs")
    parser.add_argument("--gate", type=Path, help="wait for this file before the first request")
    parser.add_argument("--plain-device", type=int, help="GPU of plain vLLM, by index among the visible ones")
    parser.add_argument("--plain-kv-gib", type=float, default=12.0)
    parser.add_argument("--budget", type=float, default=240, help="seconds for the serve part")
    parser.add_argument("--reference-budget", type=float, default=120, help="seconds for the transformers part")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--run", type=int, default=0, help="number of the run; prompts differ by it")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shapes = args.shapes or (TINY_SHAPES if args.tiny else SHAPES)
    args.reference_shapes = args.reference_shapes or args.shapes[:1]
    args.json = args.json.resolve()
    return args


def note(path: Path, part: str, key: str, value: Any) -> None:
    """Add one result to the file, and show it."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known.setdefault(part, {})[key] = value
    path.write_text(json.dumps(known, indent=2) + "\n")
    print(f"[{time.strftime('%H:%M:%S')}] {part}: {key}: {json.dumps(value)}", flush=True)


def machine() -> dict[str, Any]:
    """What it ran on."""
    import torch
    import transformers
    import vllm

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {"torch": torch.__version__, "vllm": vllm.__version__, "transformers": transformers.__version__}
    return {"gpus": gpus, "cpus": os.cpu_count(), "python": platform.python_version(), **versions}


def run_part(args: argparse.Namespace, part: str, limit: float) -> None:
    """One part as a child in a process group of its own, ended at its limit."""
    began = time.monotonic()
    log_path = Path(f"{args.json}.{part}.log")
    with log_path.open("w") as log:
        child = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--part", part],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        timer = subprocess.Popen(["sleep", str(limit)])
        try:
            _follow(child, timer, log)
        finally:
            timer.kill()
            timer.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    value = {"code": child.returncode, "seconds": round(time.monotonic() - began, 1)}
    note(args.json, part, "ended", value)
    if child.returncode:
        print("".join(log_path.read_text().splitlines(keepends=True)[-25:]), flush=True)


def _follow(child: subprocess.Popen[str], timer: subprocess.Popen[bytes], log: Any) -> None:
    """Pass the child's results on and everything to its log, until it or its time ends."""

    def copy() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            log.write(line)
            log.flush()
            if line[:1] == "[" and line[1:3].isdigit():
                print(line, end="", flush=True)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    while child.poll() is None and timer.poll() is None:
        time.sleep(0.2)
    if child.poll() is None:
        print(f"time is over: ending process {child.pid}", flush=True)
        os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(10)
    thread.join(2)


def table(path: Path) -> str:
    """The speech cells, for reading."""
    columns = ["requests", "ttft_ms", "ttfp_ms", "ttfp_p95_ms", "tpot_ms", "job_s", "rtf", "audio_s_per_s", "req_s"]
    rows = [["cell", *columns, "silence_ms"]]
    for part, cells in json.loads(path.read_text()).items():
        for key, value in cells.items():
            if key.startswith("speech ") and isinstance(value, dict):
                rows.append([f"{part} {key[7:]}", *(str(value.get(name, "")) for name in [*columns, "silence_ms"])])
            elif key.startswith("text ") and isinstance(value, dict):
                for side, turns in value.items():
                    tpots = [turn["tpot_ms"] for turn in turns]
                    ttfts = [turn["ttft_ms"] for turn in turns]
                    rows.append([f"{side} {key}", "", str(ttfts), "", "", str(tpots), "", "", "", "", ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    """The driver, or with ``--part`` one part."""
    args = parse()
    if args.part is not None:
        module = importlib.import_module({"serve": "omni_serve", "transformers": "omni_transformers"}[args.part])
        module.main(args, lambda key, value: note(args.json, args.part, key, value))
        return
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.unlink(missing_ok=True)
    note(args.json, "run", "command", " ".join(sys.argv))
    with tempfile.TemporaryDirectory(prefix="omni-speech-") as folder:
        os.environ["TMPDIR"] = folder  # models, traces, sockets
        for part in args.parts:
            run_part(args, part, args.budget + 30 if part == "serve" else args.reference_budget)
    for key, value in machine().items():
        note(args.json, "run", key, value)
    text = table(args.json)
    Path(f"{args.json}.txt").write_text(text + "\n")
    print(text, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    main()
