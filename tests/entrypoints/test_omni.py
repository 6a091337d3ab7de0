"""``Omni``: what ``generate`` takes and gives back."""

import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.entrypoints.graphs import ask, chain, stage, trace, write
from vllm_omni import Omni
from vllm_omni.errors import DeadlineError, RequestAborted, RequestError, StageDeadError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.outputs import OmniRequestOutput


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Omni]:
    """One engine for all tests here: two stages, both final."""
    stages = [
        stage(0, None, "text", engine={"report": True, "progress": True}, default_sampling_params={"seed": 1}),
        stage(1, [0], "image", engine={"report": True}),
    ]
    with Omni(stage_configs_path=write(tmp_path_factory.mktemp("omni"), stages)) as engine:
        yield engine


def run(omni: Omni, *args: Any, **kwargs: Any) -> list[OmniRequestOutput]:
    outputs = omni.generate(*args, **{"use_tqdm": False, **kwargs})
    assert isinstance(outputs, list)
    return outputs


def params_of(outputs: list[OmniRequestOutput]) -> list[Any]:
    return [output.multimodal_output["seen"]["params"] for output in outputs]


def test_one_prompt_gives_the_outputs_of_its_final_stages_in_order(omni: Omni) -> None:
    outputs = run(omni, "a cup of coffee")
    assert [(o.stage_id, o.final_output_type, trace(o)) for o in outputs] == [(0, "text", [0]), (1, "image", [0, 1])]
    assert all(output.prompt == "a cup of coffee" for output in outputs)
    number, _, rest = outputs[0].request_id.partition("_")
    assert (number, len(rest)) == ("0", 36)


def test_a_list_keeps_the_order_of_the_prompts(omni: Omni) -> None:
    outputs = run(omni, [f"p{i}" for i in range(30)], output_modalities=["text"])
    assert [output.prompt for output in outputs] == [f"p{i}" for i in range(30)]
    assert [output.request_id.split("_")[0] for output in outputs] == [str(i) for i in range(30)]
    assert run(omni, []) == []


def test_py_generator_yields_as_outputs_are_made_and_leaves_the_engine_open(omni: Omni) -> None:
    stream = omni.generate(["a", "b"], py_generator=True, use_tqdm=False)
    assert isinstance(stream, Generator)
    assert len(list(stream)) == 4
    assert len(run(omni, "again")) == 2


def test_leaving_a_generator_aborts_what_is_open(omni: Omni) -> None:
    stream = omni.generate([ask(), ask(hang=0)], py_generator=True, use_tqdm=False, output_modalities=["text"])
    assert isinstance(stream, Generator)
    next(stream)
    stream.close()
    assert omni.collective_rpc("state", stages=[0])[0]["hanging"] == []
    assert len(run(omni, "again")) == 2


def test_one_bad_prompt_among_good_ones(omni: Omni) -> None:
    prompts = ["good", ask("bad", fail=1), {"promt": "typo"}, "also good"]
    with pytest.raises(RequestError, match="told to fail") as caught:
        run(omni, prompts)
    assert [(o.prompt, o.stage_id) for o in caught.value.outputs if isinstance(o.prompt, str)] == [
        ("good", 0),
        ("good", 1),
        ("also good", 0),
        ("also good", 1),
    ]
    assert len(run(omni, "the engine goes on")) == 2
    stream = omni.generate(prompts, py_generator=True, use_tqdm=False)
    texts = []
    with pytest.raises(RequestError, match="told to fail"):
        texts.extend(output.prompt for output in stream)
    assert texts.count("good") == texts.count("also good") == 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", 'the text is empty; give a blank (" ")'),
        ({"prompt": "", "negative_prompt": "fog"}, "the text is empty"),
        ({"promt": "x"}, "unknown key 'promt'; did you mean 'prompt'?"),
        ({"negative_prompt": "x"}, 'needs "prompt" or "prompt_token_ids"'),
        ({"prompt": 3}, "prompt must be text, got int"),
        (3.5, "a prompt is text or a dictionary, got float"),
        (b"x", "a prompt is text or a dictionary, got bytes"),
        ("\ud800", "prompt: half a surrogate pair at character 0"),
        ({"prompt": "x", "negative_prompt": 3}, "negative_prompt must be text, got int"),
        ({"prompt": "x", "additional_information": [1]}, "additional_information must be a dictionary, got list"),
        ({"prompt": "x", "multi_modal_data": "cat.png"}, "multi_modal_data must be a dictionary, got str"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids must be a list of token ids, got str"),
        ({"prompt_token_ids": [1, "a"]}, "prompt_token_ids must be whole numbers, got str"),
        ({"prompt": "x", "multi_modal_data": {"image": object()}}, "multi_modal_data.image: a builtins.object cannot"),
    ],
)
def test_bad_prompts(omni: Omni, prompt: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        run(omni, [prompt])
    assert message in caught.value.message


@pytest.mark.parametrize("prompts", [None, 3, b"x"])
def test_what_is_no_prompt_at_all(omni: Omni, prompts: Any) -> None:
    with pytest.raises(RequestError, match=f"a prompt is text or a dictionary, got {type(prompts).__name__}"):
        run(omni, prompts)


def test_prompts_may_be_anything_that_can_be_iterated(omni: Omni) -> None:
    outputs = run(omni, (text for text in ("a", "b")), output_modalities=["text"])
    assert [output.prompt for output in outputs] == ["a", "b"]
    assert run(omni, []) == []


def test_sampling_parameters(omni: Omni) -> None:
    params = OmniDiffusionSamplingParams
    assert [p.seed for p in params_of(run(omni, "x"))] == [1, None]
    assert [p.seed for p in params_of(run(omni, "x", params(seed=5)))] == [5, 5]
    assert [p.seed for p in params_of(run(omni, "x", sampling_params=params(seed=6)))] == [6, 6]
    assert [p.seed for p in params_of(run(omni, "x", [params(seed=5), params(seed=6)]))] == [5, 6]
    both = params_of(run(omni, "x", params(seed=5, width=64), height=48, width=32))
    assert [(p.seed, p.height, p.width) for p in both] == [(5, 48, 32), (5, 48, 32)]
    given = params(seed=5)
    run(omni, "x", given, height=48)
    assert given.height is None, "the caller's object is left alone"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sampling_params_list": [OmniDiffusionSamplingParams()]}, "Expected 2 sampling params, got 1"),
        ({"sampling_params": {"seed": 1}}, "sampling params are dict; expected OmniDiffusionSamplingParams"),
        ({"sampling_params_list": [OmniDiffusionSamplingParams(), 3]}, "sampling params of stage 1 are int"),
        ({"hight": 64}, "unknown sampling parameter 'hight'; did you mean 'height'?"),
        ({"max_batch_size": 2}, "set max_num_seqs on Omni instead"),
        ({"device_map": "auto"}, "devices come from the stage configuration"),
        ({"height": -1}, "height=-1: allowed is 16 to 16384"),
        ({"negative_prompts": ["a", "b"]}, "2 negative_prompts for 1 prompts"),
        ({"output_modalities": ["smell"]}, "no stage makes 'smell'"),
        ({"output_modalities": "text"}, "output_modalities='text': expected a list, such as [\"text\"]"),
        ({"timeout": -1}, "timeout=-1: must be a number above 0"),
        ({"timeout": "1"}, "timeout='1': must be a number above 0"),
        (
            {"sampling_params": OmniDiffusionSamplingParams(extra_args={"foo": [1, object()]})},
            "extra_args.foo.1: a builtins.object cannot travel between processes",
        ),
        (
            {"sampling_params": OmniDiffusionSamplingParams(extra_args={"foo": {"big": 2**70}})},
            "extra_args.foo.big: cannot travel between processes",
        ),
        ({"output_modalities": []}, "output_modalities is empty; allowed are image, text"),
    ],
)
def test_bad_parameters(omni: Omni, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what is tested
        run(omni, "x", **kwargs)
    assert message in str(caught.value)


def test_negative_prompts(omni: Omni) -> None:
    outputs = run(omni, ["a", {"prompt": "b"}], negative_prompts=["n", None], output_modalities=["text"])
    assert [output.prompt for output in outputs] == [{"prompt": "a", "negative_prompt": "n"}, {"prompt": "b"}]
    outputs = run(omni, ["a", "b"], negative_prompts="n", output_modalities=["text"])
    assert [output.prompt["negative_prompt"] for output in outputs] == ["n", "n"]
    with pytest.raises(RequestError, match="beside a negative_prompt"):
        run(omni, {"prompt": "b", "negative_prompt": "c"}, negative_prompts="n")


def test_the_three_shapes_of_a_result(omni: Omni) -> None:
    output = run(omni, "x")[1]
    assert output.request_output == [output]
    assert output.images == output.outputs == []
    assert output.is_diffusion_output


def test_timeout(omni: Omni) -> None:
    with pytest.raises(DeadlineError, match="while running in stage 1"):
        run(omni, ask(hang=1), timeout=0.2)


def test_abort_from_another_thread(omni: Omni) -> None:
    errors: list[BaseException] = []
    stream = omni.generate(ask(hang=1), py_generator=True, use_tqdm=False)
    assert isinstance(stream, Generator)
    request_id = next(stream).request_id

    def rest() -> None:
        try:
            list(stream)
        except RequestAborted as error:
            errors.append(error)

    thread = threading.Thread(target=rest)
    thread.start()
    omni.abort(request_id)
    omni.abort(request_id)
    thread.join(10)
    assert len(errors) == 1


class Bar:
    """A progress bar that only remembers."""

    made: list["Bar"] = []  # noqa: RUF012

    def __init__(self, total: int, desc: str) -> None:
        self.total, self.desc, self.n, self.closed = total, desc, 0, False
        self.made.append(self)

    def update(self, count: int) -> None:
        self.n += count

    def close(self) -> None:
        self.closed = True


def test_progress_bar(omni: Omni, capsys: pytest.CaptureFixture[str]) -> None:
    Bar.made.clear()
    run(omni, "x", use_tqdm=Bar)
    run(omni, ["x", "y"], use_tqdm=Bar)
    run(omni, "x", use_tqdm=False)
    seen = [(bar.total, bar.desc, bar.n, bar.closed) for bar in Bar.made]
    assert seen == [(3, "Steps", 3, True), (2, "Processed prompts", 2, True)]
    run(omni, ["x", "y"], use_tqdm=True)
    assert "Processed prompts: 100%" in capsys.readouterr().err


def test_profile(omni: Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TORCH_PROFILER_DIR", str(tmp_path))
    omni.start_profile()
    assert omni.stop_profile() == {i: [f"{tmp_path}/stage_{i}/trace.json"] for i in range(2)}
    omni.start_profile(stages=[1])
    assert list(omni.stop_profile(stages=[1])) == [1]
    with pytest.raises(RequestError, match=r"no stage 7; there are \[0, 1\]"):
        omni.start_profile(stages=[7])
    with pytest.raises(Exception, match="AssertionError"):
        omni.stop_profile()
    assert len(run(omni, "the engine goes on")) == 2


def test_facts(omni: Omni) -> None:
    assert omni.num_stages == 2
    assert omni.is_running
    assert not omni.errored
    assert [type(params) for params in omni.default_sampling_params_list] == [OmniDiffusionSamplingParams] * 2
    omni.check_health()


def test_close(tmp_path: Path) -> None:
    omni = Omni(stage_configs_path=write(tmp_path, chain(1)))
    omni.close()
    omni.close()
    assert not omni.is_running
    calls: list[Callable[[], Any]] = [
        lambda: run(omni, "x"),
        lambda: omni.collective_rpc("report"),
        lambda: omni.check_health(),
        lambda: omni.start_profile(),
        lambda: omni.stop_profile(),
    ]
    for call in calls:
        with pytest.raises(StageDeadError, match="closed"):
            call()
    omni.abort("x")  # as of any request that has ended


def test_a_script_needs_no_main_guard_and_no_close(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, psutil\n"
        "from vllm_omni import Omni\n"
        f"omni = Omni(stage_configs_path={write(tmp_path, chain(2))!r})\n"
        "print(len(omni.generate('x', use_tqdm=False)), len(psutil.Process().children(recursive=True)))\n"
        "print(sorted({'torch', 'vllm', 'diffusers'} & set(sys.modules)))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script)], env={"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 2", "[]"]


def test_a_stage_without_torch_imports_none_of_it(omni: Omni) -> None:
    for output in run(omni, "x"):
        assert not {"torch", "numpy", "vllm", "diffusers"} & set(output.multimodal_output["seen"]["modules"])
