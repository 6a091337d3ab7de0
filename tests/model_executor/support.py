"""An omni model in the test's process: prompts with media of noise, and its three stages, driven over the package's own
edges. What differs between the families is in ``support.py`` of their folders."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm.sampling_params import SamplingParams

from tests.ar_support import Result, Stage, StageSet
from vllm_omni.inputs.edge import EdgeFunction, EdgeInput

MODALITIES = ("text", "image", "audio", "video")


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


@dataclass(frozen=True)
class PromptMaker:
    """Prompts of one family."""

    image: tuple[int, int]
    """Height and width of a picture."""
    frame: tuple[int, int]
    """The same of a video."""
    fps: float
    """Frames a second that vLLM assumes where the processor says nothing."""
    before: tuple[dict[str, Any], ...] = ()
    """Turns before the user's."""

    def __call__(
        self,
        processor: Any,
        kinds: str | Sequence[str],
        question: str = "what is it",
        seed: int = 0,
        audio_in_video: bool = False,
    ) -> Prompt:
        """A prompt with a medium of each of ``kinds``, noise drawn from ``seed``; the audio may be the video's own."""
        kinds = [kinds] if isinstance(kinds, str) else kinds
        rng = np.random.default_rng(seed)
        data: dict[str, Any] = {}
        media: dict[str, Any] = {}
        if "image" in kinds:
            image = Image.fromarray(rng.integers(0, 255, (*self.image, 3), dtype=np.uint8))
            data["image"], media["images"] = image, [image]
        if "audio" in kinds:
            audio = rng.standard_normal(16000).astype(np.float32)
            data["audio"], media["audio"] = (audio, 16000), [audio]
        if "video" in kinds:
            video = rng.integers(0, 255, (4, *self.frame, 3), dtype=np.uint8)
            data["video"], media["videos"], media["fps"] = video, [video], self.fps
        shown = [kind for kind in kinds if kind != "text" and not (audio_in_video and kind == "audio")]
        content = [*({"type": kind} for kind in shown), {"type": "text", "text": question}]
        turns = [*self.before, {"role": "user", "content": content}]
        text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return Prompt(text, data, media, audio_in_video)


@dataclass
class Spoken:
    """What a pipeline made of one prompt."""

    tokens: list[int]
    codes: Any
    """As the family's vocoder reads them."""
    wave: torch.Tensor


@dataclass
class _Source:
    """How far the outputs of one stage have gone over its edge."""

    carry: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    payloads: int = 0
    closed: bool = False

    def take(self, result: Result | None, stream: bool) -> list[dict[str, Any]] | None:
        """The outputs since the last call; None while there is nothing to hand on."""
        if result is None or self.closed or not (stream or result.finished):
            return None
        new = itertools.zip_longest(result.tokens[self.tokens :], result.payloads[self.payloads :])
        out = [{"token_ids": [] if token is None else [token], **(payload or {})} for token, payload in new]
        self.tokens, self.payloads, self.closed = len(result.tokens), len(result.payloads), result.finished
        return out if out or self.closed else None


@dataclass
class _Flow:
    """One request on its way through the stages."""

    prompt: Any
    thinker: Result
    prompt_ids: list[int] | None
    """Until they are sent."""
    talker: Result | None = None
    from_thinker: _Source = field(default_factory=_Source)
    from_talker: _Source = field(default_factory=_Source)
    chunks: int = 0
    windows: list[Result] = field(default_factory=list)


class OmniPipeline:
    """Thinker, talker and vocoder of one checkpoint; the edges are called for every output, or once at the end."""

    edges: tuple[EdgeFunction, EdgeFunction]
    """From the thinker to the talker, and on to the vocoder."""
    archs: tuple[str, str, str]
    """Classes of the stages' models."""
    vocoder_name: str
    """Of the last stage."""

    def __init__(
        self, start_stage: StageSet, folder: Path, config: Any, enforce_eager: bool, thinker: Any, talker: Any
    ) -> None:
        """``thinker`` and ``talker``: engine arguments of these stages, over those of all families."""
        self.config = config
        small = {"max_model_len": 512, "enforce_eager": enforce_eager}
        self.thinker = start_stage(folder, model_stage="thinker", model_arch=self.archs[0], **{**small, **thinker})
        self.talker = start_stage(
            folder,
            stage_id=1,
            model_stage="talker",
            model_arch=self.archs[1],
            hf_config_name="talker_config",
            skip_tokenizer_init=True,
            **{**small, **talker},
        )
        self.vocoder: Stage = start_stage(
            folder,
            "generation",
            stage_id=2,
            model_stage=self.vocoder_name,
            model_arch=self.archs[2],
            hf_config_name=f"{self.vocoder_name}_config",
        )

    def thinker_params(self, tokens: int, **values: Any) -> SamplingParams:
        """Greedy, unless ``values`` say otherwise."""
        raise NotImplementedError

    def talker_params(self, steps: int, **values: Any) -> SamplingParams:
        """Greedy, unless ``values`` say otherwise."""
        raise NotImplementedError

    def codes(self, talker: Result | None) -> Any:
        """What the talker said, without what only ends the speech."""
        raise NotImplementedError

    def speak(
        self,
        prompts: Sequence[Prompt],
        tokens: int,
        steps: int,
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
        flows: dict[str, _Flow] = {}
        for number, prompt in enumerate(prompts):
            given = dict(prompt.ours) | ({"additional_information": {"speaker": speaker}} if speaker else {})
            name = f"r{self.thinker.num_steps}-{number}"
            result = self.thinker.add(name, prompt.ours, thinker or self.thinker_params(tokens))
            flows[name] = _Flow(given, result, self.thinker.outputs.request_states[name].prompt_token_ids)
        stages = (self.thinker, self.talker, self.vocoder)
        while any(stage.scheduler.has_requests() for stage in stages):
            for stage in stages:
                if stage.scheduler.has_requests():
                    stage.step()
            for name, flow in flows.items():
                self._to_talker(name, flow, stream, talker or self.talker_params(steps))
                self._to_vocoder(name, flow, stream, extra or {}, sound)
            if on_step is not None:
                on_step()
        return [self._collect(flow) for flow in flows.values()]

    def _to_talker(self, name: str, flow: _Flow, stream: bool, params: SamplingParams) -> None:
        source = flow.from_thinker
        outputs = source.take(flow.thinker, stream)
        if outputs is None:
            return
        if outputs and flow.prompt_ids is not None:
            outputs[0]["prompt_token_ids"], flow.prompt_ids = flow.prompt_ids, None
        last = flow.thinker.finished
        edge = EdgeInput("r", {0: outputs}, flow.prompt, None, last=last, carry=source.carry, config=self.config)
        prompt = self.edges[0](edge)
        if flow.talker is None:
            if prompt is not None:
                flow.talker = self.talker.add(name, prompt, params, last=last)
        elif prompt is not None or last:
            flow.chunks += 1
            self.talker.chunk(name, prompt or {"prompt_token_ids": [0]}, flow.chunks, last=last)

    def _to_vocoder(self, name: str, flow: _Flow, stream: bool, extra: Mapping[str, Any], params: Any) -> None:
        source = flow.from_talker
        outputs = source.take(flow.talker, stream)
        if outputs is None:
            return
        values = {"last": source.closed, "carry": source.carry, "extra": extra, "config": self.config}
        prompt = self.edges[1](EdgeInput("r", {1: outputs}, flow.prompt, params, **values))
        if prompt is not None:
            flow.windows.append(self.vocoder.add(f"{name}.{len(flow.windows)}", prompt))

    def _collect(self, flow: _Flow) -> Spoken:
        for result in (flow.thinker, flow.talker, *flow.windows):
            if result is not None and result.error is not None:
                raise result.error
        waves = [payload["audio"] for window in flow.windows for payload in window.payloads]
        return Spoken(flow.thinker.tokens, self.codes(flow.talker), torch.cat(waves) if waves else torch.empty(0))
