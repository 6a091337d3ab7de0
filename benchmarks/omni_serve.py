"""The part of ``omni_speech.py`` that runs our stages, with plain vLLM's thinker beside them for comparison."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from omni_load import Heard, Shape, closed_loop, figures, prompt_ids
from omni_models import FAMILIES, stage_file, vocabulary, write_model
from omni_trace import summarise

HERE = Path(__file__).parent
Report = Callable[[str, Any], None]


class PlainVllm:
    """``omni_plain.py`` as a child; it starts while our stages start."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        command = [sys.executable, str(HERE / "omni_plain.py"), "--model", args.model, "--folder", str(folder)]
        command += ["--tiny"] if args.tiny else ["--kv-gib", str(args.plain_kv_gib)]
        if args.plain_device is not None:
            command += ["--device", str(args.plain_device)]
        self.log = open(f"{args.json}.plain.log", "w")  # noqa: SIM115 - lives as long as the child
        self.folder = folder
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1
        )

    async def read(self) -> dict[str, Any]:
        """The next answer; what else it prints goes to the log."""
        assert self.process.stdout is not None
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, self.process.stdout.readline):
            if line.startswith("@@"):
                answer: dict[str, Any] = json.loads(line[2:])
                return answer
            self.log.write(line)
        raise RuntimeError(f"plain vLLM ended with code {self.process.wait()}; see {self.log.name}")

    async def run(self, prompts: list[list[int]], tokens: int, clients: int) -> dict[str, Any]:
        """Figures of one closed loop."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens, "clients": clients}) + "\n")
        return await self.read()

    def close(self) -> None:
        """End it. Idempotent."""
        assert self.process.stdin is not None
        if self.process.poll() is not None:
            return
        self.process.stdin.close()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait(15)
        self.log.close()


class Speaker:
    """Our stages, asked for answers of fixed lengths."""

    def __init__(self, omni: Any, words: dict[str, Any], run: int) -> None:
        self.omni, self.words, self.seed = omni, words, run * 1_000_000

    def prompts(self, shape: Shape, count: int) -> list[list[int]]:
        """``count`` prompts that no request has had before."""
        begin, self.seed = self.seed, self.seed + count
        return [prompt_ids(self.words, shape.prompt, begin + i) for i in range(count)]

    async def ask(self, prompt: list[int], shape: Shape) -> Heard:
        """One request; checks that the sound is finite."""
        from vllm.sampling_params import RequestOutputKind

        params = [given.clone() for given in self.omni.default_sampling_params_list]
        thinker, talker = params[0], params[1]
        thinker.temperature, thinker.top_p, thinker.top_k = 0.0, 1.0, 0
        thinker.max_tokens, thinker.ignore_eos, thinker.output_kind = shape.text, True, RequestOutputKind.DELTA
        if shape.frames:
            talker.max_tokens = talker.min_tokens = shape.frames
        heard, sent = Heard(), time.perf_counter()
        stream = self.omni.generate(
            {"prompt_token_ids": prompt}, params, output_modalities=None if shape.frames else ["text"]
        )
        async for output in stream:
            at = time.perf_counter() - sent
            if output.final_output_type == "text":
                heard.text_at += [at] * sum(len(part.token_ids) for part in output.outputs)
            elif "audio" in output.multimodal_output:
                audio = output.multimodal_output["audio"]
                if not np.isfinite(np.asarray(audio)).all():  # torch would start its threads, and the loop waits
                    raise RuntimeError("the sound is not finite")
                heard.audio_at.append((at, len(audio)))
                heard.stages = heard.stages or output.metrics["stages"]
        heard.end = time.perf_counter() - sent
        if len(heard.text_at) != shape.text or bool(heard.audio_at) != bool(shape.frames):
            raise RuntimeError(f"{len(heard.text_at)} tokens and {len(heard.audio_at)} pieces of sound for {shape}")
        return heard

    async def run(self, shape: Shape, count: int, clients: int) -> dict[str, Any]:
        """Figures of one closed loop."""
        prompts = self.prompts(shape, count)
        return figures(*await closed_loop(lambda i: self.ask(prompts[i], shape), count, clients))


async def measure(args: argparse.Namespace, report: Report) -> None:
    """Start everything, run the cells in order until the time is used up, close everything."""
    from vllm_omni import AsyncOmni

    deadline = time.monotonic() + args.budget
    folder = write_model(args.model, Path(tempfile.mkdtemp(prefix="omni-speech-")) / args.model, args.tiny)
    plain = PlainVllm(args, folder) if args.plain == "beside" else None
    began = time.perf_counter()
    stages = stage_file(args.model, args.gpus, folder, args.tiny, args.kv_gib, tuple(args.eager))
    omni = AsyncOmni(
        model=str(folder),
        stage_configs_path=str(stages),
        stage_init_timeout=args.budget,
        gpu_sharing="mps" if args.mps else "time_slices",
    )
    report("start_s", round(time.perf_counter() - began, 1))
    try:
        async with omni:
            report("weights", await omni.collective_rpc("fill_random_weights"))
            while args.gate is not None and not args.gate.exists():
                await asyncio.sleep(0.1)
            speaker = Speaker(omni, vocabulary(folder), args.run)
            shapes = [Shape.parse(name) for name in args.shapes]
            await _speech(args, speaker, shapes[:-1], report, deadline)
            report("speech done", True)
            if args.plain == "late":
                plain = PlainVllm(args, folder)
            if args.plain != "none":
                await _text(args, speaker, plain, report, deadline)
            if plain is not None:
                plain.close()
            if args.trace:
                await _trace(args, speaker, report)
            await _speech(args, speaker, shapes[-1:], report, deadline)
    finally:
        if plain is not None:
            plain.close()
    if args.plain == "after":
        plain = PlainVllm(args, folder)
        try:
            await _text(args, None, plain, report, deadline)
        finally:
            plain.close()


async def _speech(
    args: argparse.Namespace, speaker: Speaker, shapes: list[tuple[Shape, list[int]]], report: Report, deadline: float
) -> None:
    longest = 0.0
    for shape, own_clients in shapes:
        for clients in own_clients or args.clients:
            left = deadline - time.monotonic()
            if left < 2 * longest:
                report(f"speech {shape.name} c={clients}", f"left out: {left:.0f} s left")
                continue
            began = time.monotonic()
            frames = min(shape.frames, FAMILIES[args.model].warm_frames)
            for _ in range(2 if clients > 1 else 1):  # batches form anew each time
                await speaker.run(Shape(shape.prompt, min(shape.text, 24), frames), clients, clients)
            report(f"warm-up {shape.name} c={clients} s", round(time.monotonic() - began, 2))
            cell = await speaker.run(shape, clients * args.waves if clients > 1 else args.waves + 1, clients)
            longest = max(longest, time.monotonic() - began)
            report(f"speech {shape.name} c={clients}", cell)


async def _text(
    args: argparse.Namespace, speaker: Speaker | None, plain: PlainVllm | None, report: Report, deadline: float
) -> None:
    """Text alone, ours and plain vLLM's in turns: ours, plain, plain, ours; or that side alone which there is."""
    source = speaker
    if plain is not None:
        report("plain start", await plain.read())
        source = source or Speaker(None, vocabulary(plain.folder), args.run + 50)
    assert source is not None
    shapes = sorted((Shape.parse(name)[0] for name in args.shapes), key=lambda shape: (shape.prompt, shape.text))
    for prompt, text in {shape.prompt: shape.text for shape in shapes}.items():
        shape = Shape(prompt, min(text, args.text_limit), 0)
        for clients in args.clients:
            if deadline - time.monotonic() < 20:
                report(f"text {shape.name} c={clients}", "left out: no time left")
                continue
            # Kernels are compiled at the first batch of a kind, and waves of several clients make different batches.
            for _ in range(2):
                if plain is not None:
                    await plain.run(source.prompts(shape, clients), 16, clients)
                if speaker is not None:
                    await speaker.run(Shape(shape.prompt, 16, 0), clients, clients)
            found: dict[str, list[Any]] = {"ours": [], "plain": []}
            for turn in ("ours", "plain", "plain", "ours") * args.turns:
                if turn == "plain" and plain is not None:
                    found[turn].append(await plain.run(source.prompts(shape, clients), shape.text, clients))
                elif turn == "ours" and speaker is not None:
                    found[turn].append(await speaker.run(shape, clients, clients))
            sides = {side: turns for side, turns in found.items() if turns}
            report(f"text {shape.name} c={clients}" + (" (plain alone)" if speaker is None else ""), sides)


async def _trace(args: argparse.Namespace, speaker: Speaker, report: Report) -> None:
    """Where the time of a frame goes: a profile of the stages that speak, at one client and at eight."""
    first, _ = Shape.parse(args.shapes[0])
    shape = Shape(first.prompt, min(first.text, 16), min(first.frames, 48))
    for clients in (1, 8):
        await speaker.omni.start_profile([1, 2])
        await speaker.run(shape, clients, clients)
        files = await speaker.omni.stop_profile([1, 2])
        report(f"trace files c={clients}", {str(stage): names for stage, names in files.items()})
        for stage, names in files.items():
            for name in names:
                if ".json" in name:
                    text_out = summarise(Path(name))
                    Path(f"{args.json}.trace_{args.model}_stage{stage}_c{clients}.txt").write_text(text_out)


def main(args: argparse.Namespace, report: Report) -> None:
    """Run the part; engines end with this process."""
    os.environ.setdefault("VLLM_TORCH_PROFILER_DIR", tempfile.mkdtemp(prefix="omni-trace-"))
    asyncio.run(measure(args, report))
