"""Qwen2.5-Omni in the test's process: the reference, and what sets its stages apart from other families'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.sampling_params import SamplingParams

from tests.ar_support import Result, StageSet
from tests.model_executor.support import OmniPipeline, Prompt, PromptMaker, Spoken
from vllm_omni.model_executor.stage_input_processors.qwen2_5_omni import HIDDEN_LAYERS, talker2token2wav, thinker2talker

ENDS = [8292, 8294]
SAMPLES_PER_CODE = 480
PENALTY = 1.5
"""Repetition penalty of the greedy generations: without it a random model repeats itself."""

make_prompt = PromptMaker(image=(84, 112), frame=(84, 84), fps=2.0)


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


class Pipeline(OmniPipeline):
    """Thinker, talker and token2wav."""

    edges = (thinker2talker, talker2token2wav)
    archs = (
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "Qwen2_5OmniTalkerForConditionalGeneration",
        "Qwen2_5OmniToken2WavModel",
    )
    vocoder_name = "token2wav"

    def __init__(
        self, start_stage: StageSet, folder: Path, config: Any, enforce_eager: bool = True, **talker_args: Any
    ) -> None:
        super().__init__(start_stage, folder, config, enforce_eager, {"hidden_layers": HIDDEN_LAYERS}, talker_args)

    def thinker_params(self, tokens: int, **values: Any) -> SamplingParams:
        return SamplingParams(**{"temperature": 0.0, "repetition_penalty": PENALTY, "max_tokens": tokens, **values})

    def talker_params(self, steps: int, **values: Any) -> SamplingParams:
        return self.thinker_params(steps, **{"stop_token_ids": ENDS, "detokenize": False, **values})

    def codes(self, talker: Result | None) -> list[int]:
        return [code for code in talker.tokens if code not in ENDS] if talker is not None else []
