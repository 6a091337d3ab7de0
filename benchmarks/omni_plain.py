"""Plain vLLM on the thinker of the same checkpoint, as a process that answers lines of JSON.

vLLM as it comes: its own model, scheduler and choice of model runner. Started by ``omni_speech.py``. A line on stdin is
``{"prompts": [[ids], ...], "tokens": n, "clients": c}``; the answer is one line that starts with ``@@``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from omni_load import Heard, closed_loop, figures
from omni_models import thinker_args


async def serve(args: argparse.Namespace) -> None:
    """Start the engine, then answer until stdin ends."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    values: dict[str, Any] = thinker_args(args.model, args.tiny, args.kv_gib)
    if args.device is not None:
        values["device_ids"] = [args.device]
    began = time.perf_counter()
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(model=args.folder, worker_extension_cls="random_weights.RandomWeights", **values)
    )
    count = await engine.collective_rpc("fill_random_weights")
    v2 = engine.vllm_config.use_v2_model_runner
    answer({"start_s": round(time.perf_counter() - began, 1), "weights": count[0], "v2_runner": v2})
    number = 0

    async def ask(prompt: list[int], tokens: int) -> Heard:
        nonlocal number
        number += 1
        heard, sent = Heard(), time.perf_counter()
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        params.output_kind = RequestOutputKind.DELTA
        async for output in engine.generate({"prompt_token_ids": prompt}, params, str(number)):
            heard.text_at += [time.perf_counter() - sent] * len(output.outputs[0].token_ids)
        heard.end = time.perf_counter() - sent
        return heard

    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answer(await run(ask, **json.loads(line)))
    engine.shutdown()


async def run(
    ask: Callable[[list[int], int], Awaitable[Heard]], prompts: list[list[int]], tokens: int, clients: int
) -> dict[str, Any]:
    """Figures of one closed loop."""
    return figures(*await closed_loop(lambda i: ask(prompts[i], tokens), len(prompts), clients))


def answer(value: dict[str, Any]) -> None:
    """One line to the driver."""
    print(f"@@{json.dumps(value)}", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--device", type=int)
    parser.add_argument("--kv-gib", type=float)
    parser.add_argument("--tiny", action="store_true")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
