"""What an omni stage costs over plain vLLM: time of one decode step, in one process, interleaved.

Stages of the same checkpoint run the same batch of greedy requests: vLLM's own engine, an omni stage that sends
nothing, one that sends the final hidden state of every token, and one that sends two more layers. Engines take turns,
so that what else the machine does hits all of them alike; the median over the turns is printed. On a CPU the time is
that of the process (one thread), on a GPU that of the clock.

    python benchmarks/ar_overhead.py                             a tiny random model
    python benchmarks/ar_overhead.py --model DIR --batch 32      a checkpoint
    python benchmarks/ar_overhead.py --model DIR --dummy         its sizes with random weights
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from typing import Any

import torch

MODES: dict[str, Any] = {"vllm": None, "omni, sends nothing": (), "omni, last state": (-1,), "omni, three layers": ()}


def tiny_model(folder: str) -> None:
    """A random Qwen3 of a few layers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=4096,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def engine_config(mode: str, args: argparse.Namespace) -> Any:
    """``VllmConfig`` of one engine."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_omni.engine.arg_utils import OmniEngineArgs

    values: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.batch,
        "enforce_eager": args.eager,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": args.kv_mib << 20,
        "distributed_executor_backend": "uni",
        "load_format": "dummy" if args.dummy else "auto",
    }
    if MODES[mode] is None:
        return EngineArgs(**values).create_engine_config()
    layers = MODES[mode]
    if mode == "omni, three layers":
        from vllm_omni.engine.arg_utils import OmniEngineArgs as Args

        count = Args.from_stage(0, "ar", values).create_model_config().get_total_num_hidden_layers()
        layers = (count // 3, 2 * count // 3, -1)
    return OmniEngineArgs.from_stage(0, "ar", {**values, "hidden_layers": layers}).create_engine_config()


class Engine:
    """One engine of this process and its batch."""

    def __init__(self, mode: str, args: argparse.Namespace) -> None:
        from vllm.v1.engine.core_client import InprocClient
        from vllm.v1.executor import Executor

        config = engine_config(mode, args)
        gc.freeze()
        self.client = InprocClient(config, Executor.get_class(config), log_stats=False)
        self.args = args
        self.count = 0

    def turn(self) -> float:
        """Seconds a decode step, over one whole batch; prefill and the first steps are left out."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        for _ in range(self.args.batch):
            self.count += 1
            params = SamplingParams(temperature=0.0, max_tokens=self.args.steps + 8, ignore_eos=True)
            ids = torch.randint(1, 500, (self.args.prompt,)).tolist()
            self.client.add_request(
                EngineCoreRequest(str(self.count), ids, None, params, None, time.time(), None, None, None)
            )
        done, tokens, marks = 0, 0, []
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        while done < self.args.batch:
            outputs = self.client.get_output().outputs
            tokens += sum(len(output.new_token_ids) for output in outputs)
            done += sum(output.finished for output in outputs)
            marks.append((clock(), tokens))
        steady = [(at, count) for at, count in marks if 4 * self.args.batch <= count]
        (first, before), (last, after) = steady[0], steady[-1]
        return (last - first) / (after - before) * self.args.batch


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--dummy", action="store_true", help="random weights")
    parser.add_argument("--dtype", default="float32" if not torch.cuda.is_available() else "bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--kv-mib", type=int, default=64 if not torch.cuda.is_available() else 4096)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs, no torch.compile")
    parser.add_argument("--only", nargs="*", choices=list(MODES), default=list(MODES))
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        args.eager = True
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_omni.engine.vllm_env import prepare_environment

    prepare_environment()
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            tiny_model(folder)
            args.model = folder
        engines = {mode: Engine(mode, args) for mode in args.only}
        times: dict[str, list[float]] = {mode: [] for mode in engines}
        for turn in range(args.turns + 1):
            for mode, engine in engines.items():
                seconds = engine.turn()
                if turn:
                    times[mode].append(seconds)
    medians = {mode: statistics.median(values) * 1e3 for mode, values in times.items()}
    base = medians.get("vllm", float("nan"))
    for mode, value in medians.items():
        print(f"{mode:<22} {value:8.3f} ms a step   {100 * (value / base - 1):+6.1f} %")
    if args.json:
        facts = {"torch": torch.__version__, "batch": args.batch, "model": args.model, "steps": args.steps}
        with open(args.json, "w") as file:
            json.dump({"ms_per_step": medians, "all": times, **facts}, file, indent=1)


if __name__ == "__main__":
    main()
