"""The talker under what an engine does to its requests: long prompts in parts, preemption, aborts, bad input, seeds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ar_support import Stage, StageSet
from tests.model_executor.qwen3_omni.support import SYSTEM, Pipeline, Reference, make_prompt
from tests.model_executor.support import Prompt
from tests.worker.test_decode_inputs import compared
from vllm_omni.errors import RequestError

TOKENS, FRAMES = 10, 12


@pytest.fixture(scope="module")
def pipeline(start_stage: StageSet, checkpoint: Path, reference: Reference) -> Pipeline:
    """Prompts go in parts of 16 tokens, the KV cache holds two requests of the three below, and the thinker sends the
    rows of media prompts alone."""
    return Pipeline(
        start_stage,
        checkpoint,
        reference.config,
        rows="media",
        max_num_batched_tokens=16,
        enable_chunked_prefill=True,
        block_size=32,
        num_gpu_blocks_override=7,
        max_model_len=192,
    )


@pytest.fixture(scope="module")
def talker(pipeline: Pipeline) -> Stage:
    return pipeline.talker


def payload(config: Any, seed: int, length: int = 24, text: int = 5) -> dict[str, Any]:
    """A talker prompt of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    information = {
        "text_ids": torch.randint(0, 300, (length,), generator=generator),
        "codec_ids": torch.randint(-1, 128, (length,), generator=generator),
        "text": torch.randint(0, 300, (text,), generator=generator),
    }
    return {"prompt_token_ids": [config.talker_config.codec_pad_id] * length, "additional_information": information}


def test_turns_with_media(pipeline: Pipeline, reference: Reference) -> None:
    """Two turns of the user, a picture in each, an answer between; the prompt is computed in parts."""
    images = [make_prompt(reference.processor, "image", seed=seed).data["image"] for seed in (1, 2)]
    turns = [
        SYSTEM,
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "say it"}]},
        {"role": "assistant", "content": "what you hear"},
        {"role": "user", "content": [{"type": "text", "text": "and this"}, {"type": "image"}]},
    ]
    text = reference.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompt = Prompt(text, {"image": images}, {"images": images})
    want = reference.speak(prompt, TOKENS, FRAMES)
    (got,) = pipeline.speak([prompt], TOKENS, FRAMES)
    assert got.tokens == want.tokens
    assert torch.equal(got.codes.long(), want.codes)


def test_the_thinker_sends_what_is_heard(pipeline: Pipeline, reference: Reference) -> None:
    """One payload for a prompt with media, with the rows of the prompt; none for a text prompt."""
    from vllm.sampling_params import SamplingParams

    prompts = [make_prompt(reference.processor, kind) for kind in ("image", "text")]
    image, text = pipeline.thinker.ask([p.ours for p in prompts], SamplingParams(temperature=0.0, max_tokens=5))
    assert [len(image.tokens), len(text.tokens)] == [5, 5]
    (payload,) = image.payloads
    length = reference.inputs(prompts[0])["input_ids"].shape[1]
    layer = f"hidden.{reference.config.talker_config.accept_hidden_layer}"
    assert [len(payload[name]) for name in (layer, "positions")] == [length, length]
    assert text.payloads == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_preempted_requests_say_the_same(pipeline: Pipeline, reference: Reference, stream: bool) -> None:
    prompts = [make_prompt(reference.processor, "text", "say " * n) for n in (3, 5, 8)]
    alone = [pipeline.speak([prompt], TOKENS, 40)[0] for prompt in prompts]
    preempted: list[str] = []
    scheduler = pipeline.talker.scheduler

    def look() -> None:
        preempted.extend(request.request_id for request in scheduler.waiting if request.num_preemptions)

    together = pipeline.speak(prompts, TOKENS, 40, stream=stream, on_step=look)
    assert preempted
    for got, want in zip(together, alone, strict=True):
        assert got.tokens == want.tokens
        assert torch.equal(got.codes, want.codes)


def test_inputs_that_are_moved_on(pipeline: Pipeline, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions as well, of a prompt whose positions do not end where its tokens do."""
    prompts = [make_prompt(reference.processor, kind) for kind in ("image", "text")]
    alone = [pipeline.speak([prompt], TOKENS, 20)[0] for prompt in prompts]
    with compared(pipeline.talker, monkeypatch) as moved:
        together = pipeline.speak(prompts, TOKENS, 20)
    assert len(moved) > 10
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got.codes, want.codes)


def test_speech_ends_with_its_end_token(pipeline: Pipeline, reference: Reference) -> None:
    """Whatever token is made the end: no frame of it reaches the vocoder's edge, and the others are unchanged."""
    config = reference.config
    (free,) = pipeline.talker.ask([payload(config, 3)], pipeline.talker_params(FRAMES))
    end = free.tokens[7]
    at = free.tokens.index(end)
    (cut,) = pipeline.talker.ask([payload(config, 3)], pipeline.talker_params(FRAMES, stop_token_ids=[end]))
    assert (cut.finish_reason, cut.stop_reason) == ("stop", end)
    assert cut.tokens == free.tokens[: at + 1]


def test_control_tokens_are_never_sampled(pipeline: Pipeline, reference: Reference) -> None:
    params = pipeline.talker_params(60, temperature=2.0)
    results = pipeline.talker.ask([payload(reference.config, seed) for seed in range(3)], params)
    tokens = {token for result in results for token in result.tokens}
    assert len(tokens) > 50
    assert max(tokens) <= reference.config.talker_config.codec_eos_token_id
    assert tokens - set(range(128)) <= {reference.config.talker_config.codec_eos_token_id}


def test_a_seed_repeats_all_codes(talker: Stage, pipeline: Pipeline, reference: Reference) -> None:
    """The prompt goes in one part: on the CPU vLLM cannot take back a draw from a seeded generator."""

    def codes(seeds: list[int | None]) -> list[torch.Tensor]:
        results = [
            talker.add(f"s{talker.num_steps}-{i}", payload(reference.config, 1, length=7), params)
            for i, params in enumerate(
                pipeline.talker_params(8, temperature=0.9, top_k=50, seed=seed) for seed in seeds
            )
        ]
        talker.run()
        return [torch.stack(result.steps("codes")) for result in results]

    (alone,) = codes([11])
    together = codes([12, 11])
    assert torch.equal(together[1], alone)
    assert not torch.equal(together[0], alone)


def test_bad_payloads_fail_alone(talker: Stage, pipeline: Pipeline, reference: Reference) -> None:
    """A typed error for the request that is wrong; the one beside it, and the next one, are right."""
    config = reference.config
    params = pipeline.talker_params(4)
    (want,) = talker.ask([payload(config, 1)], params)
    missing, short, beyond = (payload(config, 1) for _ in range(3))
    del missing["additional_information"]["codec_ids"]
    short["additional_information"]["text_ids"] = torch.zeros(3, dtype=torch.int64)
    size = config.talker_config.thinker_hidden_size
    beyond["additional_information"] |= {
        "hidden": torch.zeros(4, size),
        "positions": torch.zeros(4, 3, dtype=torch.int64),
        "rows": torch.tensor([2, 3, 4]),
        "media": torch.tensor([True, False, True]),
    }
    results = talker.ask([missing, payload(config, 1), short, beyond], params)
    for result, message in zip(results, ("codec_ids", None, "text_ids", "rows"), strict=True):
        if message is None:
            assert result.error is None
            assert torch.equal(torch.stack(result.steps("codes")), torch.stack(want.steps("codes")))
        else:
            assert isinstance(result.error, RequestError)
            assert message in result.error.message
    assert not talker.runner.omni_states
    (again,) = talker.ask([payload(config, 1)], params)
    assert again.tokens == want.tokens


def test_an_abort_leaves_nothing(talker: Stage, pipeline: Pipeline, reference: Reference) -> None:
    params = pipeline.talker_params(20)
    (want,) = talker.ask([payload(reference.config, 2)], params)
    kept = talker.add("kept", payload(reference.config, 2), params)
    gone = talker.add("gone", payload(reference.config, 3), params)
    talker.run(until=lambda: len(gone.tokens) > 4)
    talker.abort("gone")
    talker.run()
    assert kept.tokens == want.tokens
    assert len(gone.tokens) < 20
    talker.ask([payload(reference.config, 4)], params)
    assert not talker.runner.omni_states
