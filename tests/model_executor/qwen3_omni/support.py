"""Qwen3-Omni in the test's process: the reference, and what sets its stages apart from other families'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.sampling_params import SamplingParams

from tests.ar_support import Result, StageSet
from tests.model_executor.support import OmniPipeline, Prompt, PromptMaker, Spoken
from vllm_omni.model_executor.stage_input_processors.qwen3_omni import talker2code2wav, thinker2talker

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}

make_prompt = PromptMaker(image=(64, 96), frame=(64, 64), fps=1.0, before=(SYSTEM,))


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


class Pipeline(OmniPipeline):
    """Thinker, talker and code2wav."""

    edges = (thinker2talker, talker2code2wav)
    archs = (
        "Qwen3OmniThinkerForConditionalGeneration",
        "Qwen3OmniTalkerForConditionalGeneration",
        "Qwen3OmniCode2WavForConditionalGeneration",
    )
    vocoder_name = "code2wav"

    def __init__(
        self,
        start_stage: StageSet,
        folder: Path,
        config: Any,
        rows: str = "all",
        enforce_eager: bool = True,
        **talker_args: Any,
    ) -> None:
        thinker = {"hidden_layers": (0, config.talker_config.accept_hidden_layer), "hidden_rows": rows}
        super().__init__(start_stage, folder, config, enforce_eager, thinker, talker_args)

    def thinker_params(self, tokens: int, **values: Any) -> SamplingParams:
        return SamplingParams(**{"temperature": 0.0, "max_tokens": tokens, **values})

    def talker_params(self, steps: int, **values: Any) -> SamplingParams:
        stop = [self.config.talker_config.codec_eos_token_id]
        released = {"repetition_penalty": 1.05, "stop_token_ids": stop, "detokenize": False}
        return self.thinker_params(steps, **{**released, **values})

    def codes(self, talker: Result | None) -> torch.Tensor:
        """[frames, code groups]"""
        return torch.stack(talker.steps("codes")) if talker is not None else torch.empty(0, 16)
