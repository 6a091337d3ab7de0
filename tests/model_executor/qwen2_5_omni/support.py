"""Qwen2.5-Omni in the test's process: the reference and the three stages, driven over the package's own edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm.sampling_params import SamplingParams

from tests.ar_support import Result, StageSet
from vllm_omni.inputs.edge import EdgeInput
from vllm_omni.model_executor.stage_input_processors.qwen2_5_omni import HIDDEN_LAYERS, talker2token2wav, thinker2talker

MODALITIES = ("text", "image", "audio", "video")
ENDS = [8292, 8294]
SAMPLES_PER_CODE = 480
PENALTY = 1.5
"""Repetition penalty of the greedy generations: without it a random model repeats itself."""


@dataclass(frozen=True)
class Prompt:
    """One prompt in vLLM's form and in transformers'."""

    text: str
    data: dict[str, Any]
    """vLLM's ``multi_modal_data``."""
    media: dict[str, Any]
    """Arguments of transformers' processor."""
    audio_in_video: bool = False
    """Whether the sound is the video's own."""

    @property
    def ours(self) -> dict[str, Any]:
        """As a stage gets it."""
        out: dict[str, Any] = {"prompt": self.text}
        if self.data:
            out["multi_modal_data"] = self.data
        if self.audio_in_video:
            out["mm_processor_kwargs"] = {"use_audio_in_video": True}
        return out


def make_prompt(
    processor: Any, kinds: Sequence[str], question: str = "what is it", seed: int = 0, audio_in_video: bool = False
) -> Prompt:
    """A prompt with one medium of each of ``kinds``, noise drawn from ``seed``; the audio may be the video's own."""
    rng = np.random.default_rng(seed)
    data: dict[str, Any] = {}
    media: dict[str, Any] = {}
    if "image" in kinds:
        image = Image.fromarray(rng.integers(0, 255, (84, 112, 3), dtype=np.uint8))
        data["image"], media["images"] = image, [image]
    if "audio" in kinds:
        audio = rng.standard_normal(16000).astype(np.float32)
        data["audio"], media["audio"] = (audio, 16000), [audio]
    if "video" in kinds:
        video = rng.integers(0, 255, (4, 84, 84, 3), dtype=np.uint8)
        # vLLM takes one second a pair of frames where the processor says nothing; that is two frames a second.
        data["video"], media["videos"], media["fps"] = video, [video], 2.0
    shown = [kind for kind in kinds if kind != "text" and not (audio_in_video and kind == "audio")]
    turns = [{"role": "user", "content": [*({"type": kind} for kind in shown), {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return Prompt(text, data, media, audio_in_video)


@dataclass
class Spoken:
    """What a pipeline made of one prompt."""

    tokens: list[int]
    codes: list[int]
    wave: torch.Tensor


class Reference:
    """transformers' own model, its codes kept."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor, Qwen2_5OmniForConditionalGeneration

        self.model = Qwen2_5OmniForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.config = self.model.config
        self._codes: list[torch.Tensor] = []
        self.model.token2wav.register_forward_pre_hook(lambda module, args: self._codes.append(args[0]))

    def inputs(self, prompt: Prompt) -> dict[str, Any]:
        """The processor's output, with one pad before the prompt.

        ``generate`` of transformers 5.19 drops an attention mask of ones, and without a mask its talker forgets the
        codec embeddings of the prompt's end and its three-dimensional positions. The pad keeps the mask.
        """
        sounds = {"use_audio_in_video": True} if prompt.audio_in_video else {}
        out = dict(self.processor(text=prompt.text, return_tensors="pt", **prompt.media, **sounds), **sounds)
        pad = self.processor.tokenizer.pad_token_id
        out["input_ids"] = torch.nn.functional.pad(out["input_ids"], (1, 0), value=pad)
        out["attention_mask"] = torch.nn.functional.pad(out["attention_mask"], (1, 0), value=0)
        for name in ("pixel_values", "pixel_values_videos"):
            if name in out:  # without the prefix the talker gets them too, and refuses them
                out[f"thinker_{name}"] = out.pop(name)
        return out

    def speak(self, prompt: Prompt, tokens: int, codes: int, **values: Any) -> Spoken:
        """Greedy text of ``tokens`` tokens, ``codes`` greedy codes, and their sound from noise of seed 0."""
        torch.manual_seed(0)
        self._codes.clear()
        inputs = self.inputs(prompt)
        sequences, wave = self.model.generate(
            **inputs,
            thinker_max_new_tokens=tokens,
            thinker_do_sample=False,
            thinker_repetition_penalty=PENALTY,
            talker_do_sample=False,
            talker_max_new_tokens=codes,
            talker_repetition_penalty=PENALTY,
            **values,
        )
        return Spoken(sequences[0, inputs["input_ids"].shape[1] :].tolist(), self._codes[0][0].tolist(), wave)

    def sound(self, codes: Sequence[int], speaker: str, seed: int = 0, **values: Any) -> torch.Tensor:
        """Waveform of codes."""
        voice = self.model.speaker_map[speaker]
        torch.manual_seed(seed)
        with torch.inference_mode():
            wave: torch.Tensor = self.model.token2wav(torch.tensor([codes]), voice["cond"], voice["ref_mel"], **values)
        return wave.reshape(-1)


@dataclass
class _Flow:
    """One request on its way through the stages."""

    prompt: Any
    prompt_ids: list[int] = field(default_factory=list)
    thinker: Result = field(default_factory=Result)
    talker: Result | None = None
    carries: tuple[dict[str, Any], dict[str, Any]] = field(default_factory=lambda: ({}, {}))
    seen: list[int] = field(default_factory=lambda: [0, 0])
    closed: list[bool] = field(default_factory=lambda: [False, False])
    chunks: int = 0
    windows: list[Result] = field(default_factory=list)


class Pipeline:
    """Thinker, talker and token2wav of one checkpoint; the edges are called for every output, or once at the end."""

    def __init__(
        self, start_stage: StageSet, folder: Path, config: Any, enforce_eager: bool = True, **talker_args: Any
    ) -> None:
        self.config = config
        self.thinker = start_stage(
            folder,
            model_stage="thinker",
            model_arch="Qwen2_5OmniThinkerForConditionalGeneration",
            hidden_layers=HIDDEN_LAYERS,
            enforce_eager=enforce_eager,
            max_model_len=512,
        )
        self.talker = start_stage(
            folder,
            stage_id=1,
            model_stage="talker",
            model_arch="Qwen2_5OmniTalkerForConditionalGeneration",
            hf_config_name="talker_config",
            skip_tokenizer_init=True,
            **{"max_model_len": 512, "enforce_eager": enforce_eager, **talker_args},
        )
        self.token2wav = start_stage(
            folder,
            "generation",
            stage_id=2,
            model_stage="token2wav",
            model_arch="Qwen2_5OmniToken2WavModel",
            hf_config_name="token2wav_config",
        )

    def talker_params(self, codes: int, **values: Any) -> SamplingParams:
        """Greedy, unless ``values`` say otherwise."""
        defaults = {"temperature": 0.0, "repetition_penalty": PENALTY, "stop_token_ids": ENDS, "detokenize": False}
        return SamplingParams(**{**defaults, "max_tokens": codes, **values})

    def speak(
        self,
        prompts: Sequence[Prompt],
        tokens: int,
        codes: int,
        *,
        stream: bool = False,
        speaker: str | None = None,
        extra: Mapping[str, Any] | None = None,
        thinker: SamplingParams | None = None,
        talker: SamplingParams | None = None,
        sound: SamplingParams | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> list[Spoken]:
        """Run ``prompts`` together through all stages."""
        params = thinker or thinker_params(tokens)
        flows: dict[str, _Flow] = {}
        for number, prompt in enumerate(prompts):
            given: Any = dict(prompt.ours)
            if speaker is not None:
                given["additional_information"] = {"speaker": speaker}
            name = f"r{self.thinker.num_steps}-{number}"
            flow = flows[name] = _Flow(given)
            flow.thinker = self.thinker.add(name, prompt.ours, params)
            flow.prompt_ids = self.thinker.outputs.request_states[name].prompt_token_ids
        stages = (self.thinker, self.talker, self.token2wav)
        while any(stage.scheduler.has_requests() for stage in stages):
            for stage in stages:
                if stage.scheduler.has_requests():
                    stage.step()
            for name, flow in flows.items():
                self._to_talker(name, flow, stream, talker or self.talker_params(codes))
                self._to_token2wav(name, flow, stream, extra or {}, sound)
            if on_step is not None:
                on_step()
        return [_collect(flow) for flow in flows.values()]

    def _edge(self, flow: _Flow, source: int, outputs: Sequence[Mapping[str, Any]], **values: Any) -> EdgeInput:
        carry = flow.carries[source]
        values = {"sampling_params": None, **values}
        return EdgeInput("r", {source: outputs}, flow.prompt, carry=carry, config=self.config, **values)

    def _to_talker(self, name: str, flow: _Flow, stream: bool, params: SamplingParams) -> None:
        result = flow.thinker
        if flow.closed[0] or not (stream or result.finished):
            return
        new = range(flow.seen[0], len(result.tokens))
        outputs = [{"token_ids": [result.tokens[i]], **result.payloads[i]} for i in new]
        if outputs and not flow.seen[0]:
            outputs[0]["prompt_token_ids"] = flow.prompt_ids
        flow.seen[0], flow.closed[0] = len(result.tokens), result.finished
        prompt = thinker2talker(self._edge(flow, 0, outputs, last=result.finished))
        if flow.talker is None:
            if prompt is not None:
                flow.talker = self.talker.add(name, prompt, params, last=result.finished)
        elif prompt is not None or result.finished:
            flow.chunks += 1
            self.talker.chunk(name, prompt or {"prompt_token_ids": [0]}, flow.chunks, last=result.finished)

    def _to_token2wav(self, name: str, flow: _Flow, stream: bool, extra: Mapping[str, Any], params: Any) -> None:
        result = flow.talker
        if result is None or flow.closed[1] or not (stream or result.finished):
            return
        outputs = [{"token_ids": result.tokens[flow.seen[1] :]}]
        flow.seen[1], flow.closed[1] = len(result.tokens), result.finished
        edge = self._edge(flow, 1, outputs, last=result.finished, extra=extra, sampling_params=params)
        prompt = talker2token2wav(edge)
        if prompt is not None:
            flow.windows.append(self.token2wav.add(f"{name}.{len(flow.windows)}", prompt))


def thinker_params(tokens: int, **values: Any) -> SamplingParams:
    """Greedy, unless ``values`` say otherwise."""
    return SamplingParams(**{"temperature": 0.0, "repetition_penalty": PENALTY, "max_tokens": tokens, **values})


def _collect(flow: _Flow) -> Spoken:
    for result in (flow.thinker, flow.talker, *flow.windows):
        if result is not None and result.error is not None:
            raise result.error
    codes = [code for code in flow.talker.tokens if code not in ENDS] if flow.talker is not None else []
    waves = [payload["audio"] for window in flow.windows for payload in window.payloads]
    return Spoken(flow.thinker.tokens, codes, torch.cat(waves) if waves else torch.empty(0))
