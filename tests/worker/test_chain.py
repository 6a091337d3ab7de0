"""Three stages in a row, thinker -> talker -> vocoder: streamed equals unstreamed equals plain torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams

from tests.ar_models import HIDDEN, save_lm
from tests.ar_support import Stage, StageSet
from tests.ar_toy import CODES, FRAME, GROUPS, save_talker, save_vocoder, talk

WORDS, STEPS = 10, 16
THINK = SamplingParams(temperature=0.0, max_tokens=WORDS, ignore_eos=True)
TALK = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
PROMPTS = {f"r{n}": list(range(3, 3 + n)) for n in (6, 11, 30)}


class Chain:
    """The three stages and their plain torch counterparts."""

    def __init__(self, folder: Path, start_stage: StageSet) -> None:
        for name in ("thinker", "talker", "vocoder"):
            (folder / name).mkdir()
        self.lm = save_lm(folder / "thinker")
        self.body, self.predictor = save_talker(folder / "talker")
        self.wave = save_vocoder(folder / "vocoder")
        self.thinker: Stage = start_stage(folder / "thinker", hidden_layers=(2,))
        self.talker: Stage = start_stage(folder / "talker", model_arch="ToyTalker", model_stage="talker", stage_id=1)
        self.vocoder: Stage = start_stage(
            folder / "vocoder", "generation", model_arch="ToyVocoder", model_stage="code2wav", stage_id=2
        )
        self.stages = (self.thinker, self.talker, self.vocoder)

    @torch.inference_mode()
    def reference(self, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and samples in plain torch."""
        out = self.lm.generate(torch.tensor([prompt]), max_new_tokens=WORDS, do_sample=False, eos_token_id=None)
        states = self.lm(out[:, :-1], output_hidden_states=True).hidden_states[2][0]
        _, codes = talk(self.body, self.predictor, states[: len(prompt)], states[len(prompt) :], STEPS)
        return codes, self.wave(codes[None])[0]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, start_stage: StageSet) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"), start_stage)


def start_thinking(chain: Chain) -> None:
    for name, prompt in PROMPTS.items():
        chain.thinker.add(name, {"prompt_token_ids": prompt}, THINK)


def test_stage_by_stage(chain: Chain) -> None:
    start_thinking(chain)
    thought = chain.thinker.run()
    for name, prompt in PROMPTS.items():
        rows, count = thought[name].rows("hidden.2"), len(prompt)
        information = {"prompt": rows[:count], "cond": rows[count:]}
        chain.talker.add(name, {"prompt_token_ids": [0] * count, "additional_information": information}, TALK)
    said = chain.talker.run()
    for name in PROMPTS:
        codes = torch.stack(said[name].steps("codes"))
        chain.vocoder.add(name, {"prompt": "", "additional_information": {"codes": codes}})
    heard = chain.vocoder.run()
    for name, prompt in PROMPTS.items():
        codes, wave = chain.reference(prompt)
        assert torch.equal(torch.stack(said[name].steps("codes")), codes)
        (payload,) = heard[name].payloads
        assert payload["sr"] == 8000
        torch.testing.assert_close(payload["audio"], wave, atol=1e-6, rtol=1e-5)
    assert max(chain.vocoder.model.batches) == len(PROMPTS)


class Pipe:
    """Moves what one stage gave to the next as it comes."""

    def __init__(self, chain: Chain, first: int, then: int) -> None:
        self.chain, self.first, self.then = chain, first, then
        self.thought = dict.fromkeys(PROMPTS, 0)
        self.spoken = dict.fromkeys(PROMPTS, 0)
        self.windows: dict[str, list[str]] = {name: [] for name in PROMPTS}

    def to_talker(self, name: str) -> None:
        """One payload of the thinker becomes the request, or a chunk of one conditioning row."""
        result, number = self.chain.thinker.results[name], self.thought[name]
        while number < len(result.payloads):
            rows, last = result.payloads[number]["hidden.2"], number == WORDS - 1
            if number == 0:
                prompt = {"prompt_token_ids": [0] * len(rows), "additional_information": {"prompt": rows}}
                self.chain.talker.add(name, prompt, TALK, last=False)
            else:
                piece = {"additional_information": {"cond": rows}, "conditioning_steps": 1}
                self.chain.talker.chunk(name, piece, number, last=last)
            number += 1
        self.thought[name] = number

    def to_vocoder(self, name: str) -> None:
        """Enough frames make a window: one frame of context and what is new."""
        if name not in self.chain.talker.results:
            return
        result, done = self.chain.talker.results[name], self.spoken[name]
        ready = len(result.payloads)
        if ready - done < (self.first if done == 0 else self.then) and not (result.finished and ready > done):
            return
        context = min(done, 1)
        codes = torch.stack([payload["codes"] for payload in result.payloads[done - context : ready]])
        window = f"{name}.{len(self.windows[name])}"
        information = {"codes": codes, "context": context}
        self.chain.vocoder.add(window, {"prompt": "", "additional_information": information})
        self.windows[name].append(window)
        self.spoken[name] = ready


def test_streamed(chain: Chain) -> None:
    for stage in chain.stages:
        stage.results.clear()
    start_thinking(chain)
    pipe = Pipe(chain, first=2, then=5)
    heard_at: dict[str, int] = {}
    for tick in range(200):
        for stage in chain.stages:
            if stage.scheduler.has_requests():
                stage.step()
        for name in PROMPTS:
            pipe.to_talker(name)
            pipe.to_vocoder(name)
            if pipe.windows[name] and chain.vocoder.results[pipe.windows[name][0]].finished:
                heard_at.setdefault(name, tick)
            if name == "r6" and name in heard_at and heard_at[name] == tick:
                assert len(chain.thinker.results[name].tokens) < WORDS  # heard before the thinker is done
        if not any(stage.scheduler.has_requests() for stage in chain.stages):
            break
    for name, prompt in PROMPTS.items():
        codes, wave = chain.reference(prompt)
        assert torch.equal(torch.stack(chain.talker.results[name].steps("codes")), codes)
        parts = [chain.vocoder.results[window].payloads[0]["audio"] for window in pipe.windows[name]]
        assert len(parts) == 4
        assert [len(part) for part in parts] == [2 * FRAME, 5 * FRAME, 5 * FRAME, 4 * FRAME]
        torch.testing.assert_close(torch.cat(parts), wave, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("information", "kind", "words"),
    [
        ({"codes": torch.full((3, GROUPS), CODES)}, "RequestError", "out of range"),
        ({}, "RequestError", "no 'codes'"),
        ({"codes": torch.zeros(3, GROUPS, dtype=torch.int64), "too_big": True}, "OutOfMemoryError", "stage 2"),
    ],
)
def test_one_of_a_batch_fails(chain: Chain, information: dict[str, Any], kind: str, words: str) -> None:
    codes = torch.arange(6 * GROUPS).reshape(6, GROUPS)
    good = [chain.vocoder.add(f"g{i}", {"prompt": "", "additional_information": {"codes": codes}}) for i in range(3)]
    bad = chain.vocoder.add("bad", {"prompt": "", "additional_information": information})
    chain.vocoder.run()
    assert type(bad.error).__name__ == kind
    assert words in str(bad.error)
    for result in good:
        torch.testing.assert_close(result.payloads[0]["audio"], chain.wave(codes[None])[0])
    assert not chain.vocoder.runner.omni_states


def test_hidden_size_of_the_chain(chain: Chain) -> None:
    """The payload that goes from stage to stage is what the model made, not a copy of something wider."""
    result = chain.thinker.ask([{"prompt_token_ids": [1, 2, 3]}], THINK)[0]
    assert [set(payload) for payload in result.payloads] == [{"start", "hidden.2"}] * WORDS
    assert [tuple(payload["hidden.2"].shape) for payload in result.payloads] == [(3, HIDDEN)] + [(1, HIDDEN)] * 9
