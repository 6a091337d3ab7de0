"""Qwen3-Omni in the test's process: the reference and the three stages, driven over the package's own edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm.sampling_params import SamplingParams

from tests.ar_support import Result, Stage, StageSet
from vllm_omni.inputs.edge import EdgeInput
from vllm_omni.model_executor.stage_input_processors.qwen3_omni import talker2code2wav, thinker2talker

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
MODALITIES = ("text", "image", "audio", "video")


@dataclass(frozen=True)
class Prompt:
    """One prompt in vLLM's form and in transformers'."""

    text: str
    data: dict[str, Any]
    """vLLM's ``multi_modal_data``."""
    media: dict[str, Any]
    """Arguments of transformers' processor."""

    @property
    def ours(self) -> dict[str, Any]:
        """As a stage gets it."""
        return {"prompt": self.text, "multi_modal_data": self.data} if self.data else {"prompt": self.text}


def make_prompt(processor: Any, kind: str, question: str = "what is it", seed: int = 0) -> Prompt:
    """A prompt with one medium of ``kind`` (or ``text``), noise drawn from ``seed``."""
    rng = np.random.default_rng(seed)
    data: dict[str, Any] = {}
    media: dict[str, Any] = {}
    if kind == "image":
        image = Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8))
        data, media = {"image": image}, {"images": [image]}
    elif kind == "audio":
        audio = rng.standard_normal(16000).astype(np.float32)
        data, media = {"audio": (audio, 16000)}, {"audio": [audio]}
    elif kind == "video":
        video = rng.integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
        # vLLM takes two seconds a pair of frames where the processor says nothing; that is one frame a second.
        data, media = {"video": video}, {"videos": [video], "fps": 1.0}
    content = [{"type": kind}] if kind != "text" else []
    turns = [SYSTEM, {"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return Prompt(text, data, media)


@dataclass
class Spoken:
    """What a pipeline made of one prompt."""

    tokens: list[int]
    codes: torch.Tensor
    """[frames, code groups]"""
    wave: torch.Tensor


class Reference:
    """transformers' own model, its inner results kept."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor, Qwen3OmniMoeForConditionalGeneration

        self.model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.config = self.model.config

    def inputs(self, prompt: Prompt) -> dict[str, Any]:
        """The processor's output."""
        return dict(self.processor(text=prompt.text, return_tensors="pt", **prompt.media))

    def states(self, prompt: Prompt, tokens: list[int]) -> tuple[torch.Tensor, ...]:
        """``hidden_states`` of the prompt and all ``tokens`` but the last."""
        inputs = self.inputs(prompt)
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens[:-1]], dtype=torch.int64)], dim=1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            return tuple(s[0] for s in self.model.thinker(**inputs, output_hidden_states=True).hidden_states)

    def speak(self, prompt: Prompt, tokens: int, frames: int, speaker: str = "Ethan") -> Spoken:
        """Greedy text of ``tokens`` tokens, ``frames`` audio frames and their waveform.

        transformers computes the codes of a frame with the next token, so it needs one more.
        """
        results = []
        generate = self.model.talker.generate
        self.model.talker.generate = lambda *args, **kwargs: results.append(generate(*args, **kwargs)) or results[-1]
        try:
            sequences, wave = self.model.generate(
                **self.inputs(prompt),
                speaker=speaker,
                thinker_do_sample=False,
                thinker_max_new_tokens=tokens,
                talker_do_sample=False,
                talker_max_new_tokens=frames + 1,
            )
        finally:
            self.model.talker.generate = generate
        codes = torch.stack([step[-1][0] for step in results[0].hidden_states if step[-1] is not None])
        return Spoken(sequences[0, -tokens:].tolist(), codes, wave[0, 0])


@dataclass
class _Flow:
    """One request on its way through the stages."""

    prompt: Any
    prompt_ids: list[int] = field(default_factory=list)
    thinker: Result = field(default_factory=Result)
    talker: Result | None = None
    carries: tuple[dict[str, Any], dict[str, Any]] = field(default_factory=lambda: ({}, {}))
    seen: list[int] = field(default_factory=lambda: [0, 0])
    chunks: int = 0
    windows: list[Result] = field(default_factory=list)


class Pipeline:
    """Thinker, talker and code2wav of one checkpoint; the edges are called for every output, or once at the end."""

    def __init__(
        self,
        start_stage: StageSet,
        folder: Path,
        config: Any,
        rows: str = "all",
        enforce_eager: bool = True,
        **talker_args: Any,
    ) -> None:
        self.config = config
        self.thinker = start_stage(
            folder,
            model_stage="thinker",
            model_arch="Qwen3OmniThinkerForConditionalGeneration",
            hidden_layers=(0, config.talker_config.accept_hidden_layer),
            hidden_rows=rows,
            enforce_eager=enforce_eager,
            max_model_len=512,
        )
        self.talker = start_stage(
            folder,
            stage_id=1,
            model_stage="talker",
            model_arch="Qwen3OmniTalkerForConditionalGeneration",
            hf_config_name="talker_config",
            skip_tokenizer_init=True,
            **{"max_model_len": 512, "enforce_eager": enforce_eager, **talker_args},
        )
        self.code2wav: Stage = start_stage(
            folder,
            "generation",
            stage_id=2,
            model_stage="code2wav",
            model_arch="Qwen3OmniCode2WavForConditionalGeneration",
            hf_config_name="code2wav_config",
        )

    def talker_params(self, frames: int, **values: Any) -> SamplingParams:
        """Greedy with the released repetition penalty, unless ``values`` say otherwise."""
        stop = [self.config.talker_config.codec_eos_token_id]
        defaults = {"temperature": 0.0, "repetition_penalty": 1.05, "stop_token_ids": stop, "detokenize": False}
        return SamplingParams(**{**defaults, "max_tokens": frames, **values})

    def speak(
        self,
        prompts: Sequence[Prompt],
        tokens: int,
        frames: int,
        *,
        stream: bool = False,
        speaker: str | None = None,
        extra: Mapping[str, Any] | None = None,
        talker: SamplingParams | None = None,
        thinker: SamplingParams | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> list[Spoken]:
        """Run ``prompts`` together through all stages."""
        params = thinker or SamplingParams(temperature=0.0, max_tokens=tokens)
        flows: dict[str, _Flow] = {}
        for number, prompt in enumerate(prompts):
            given: Any = dict(prompt.ours)
            if speaker is not None:
                given["additional_information"] = {"speaker": speaker}
            name = f"r{self.thinker.num_steps}-{number}"
            flow = flows[name] = _Flow(given)
            flow.thinker = self.thinker.add(name, prompt.ours, params)
            flow.prompt_ids = self.thinker.outputs.request_states[name].prompt_token_ids
        stages = (self.thinker, self.talker, self.code2wav)
        while any(stage.scheduler.has_requests() for stage in stages):
            for stage in stages:
                if stage.scheduler.has_requests():
                    stage.step()
            for name, flow in flows.items():
                self._to_talker(name, flow, stream, talker or self.talker_params(frames))
                self._to_code2wav(name, flow, stream, extra or {})
            if on_step is not None:
                on_step()
        return [self._collect(flow) for flow in flows.values()]

    def _edge(self, flow: _Flow, source: int, outputs: Sequence[Mapping[str, Any]], **values: Any) -> EdgeInput:
        carry = flow.carries[source]
        return EdgeInput("r", {source: outputs}, flow.prompt, None, carry=carry, config=self.config, **values)

    def _to_talker(self, name: str, flow: _Flow, stream: bool, params: SamplingParams) -> None:
        result = flow.thinker
        new = range(flow.seen[0], len(result.tokens))
        if not new or not (stream or result.finished):
            return
        outputs = [{"token_ids": [result.tokens[i]], **dict(*result.payloads[i : i + 1])} for i in new]
        if not flow.seen[0]:
            outputs[0]["prompt_token_ids"] = flow.prompt_ids
        flow.seen[0] = len(result.tokens)
        prompt = thinker2talker(self._edge(flow, 0, outputs, last=result.finished))
        if prompt is None:
            return
        if flow.talker is None:
            flow.talker = self.talker.add(name, prompt, params, last=result.finished)
        else:
            flow.chunks += 1
            self.talker.chunk(name, prompt, flow.chunks, last=result.finished)

    def _to_code2wav(self, name: str, flow: _Flow, stream: bool, extra: Mapping[str, Any]) -> None:
        result = flow.talker
        if result is None or flow.seen[1] < 0 or not (stream or result.finished):
            return
        outputs = result.payloads[flow.seen[1] :]
        flow.seen[1] = -1 if result.finished else len(result.payloads)
        prompt = talker2code2wav(self._edge(flow, 1, outputs, last=result.finished, extra=extra))
        if prompt is not None:
            flow.windows.append(self.code2wav.add(f"{name}.{len(flow.windows)}", prompt))

    def _collect(self, flow: _Flow) -> Spoken:
        for result in (flow.thinker, flow.talker, *flow.windows):
            if result is not None and result.error is not None:
                raise result.error
        codes = torch.stack(flow.talker.steps("codes")) if flow.talker is not None else torch.empty(0, 16)
        waves = [payload["audio"] for window in flow.windows for payload in window.payloads]
        return Spoken(flow.thinker.tokens, codes, torch.cat(waves) if waves else torch.empty(0))
