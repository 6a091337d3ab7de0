"""Text to picture through the whole stack: ``Omni`` on tiny FLUX.1 and Qwen-Image checkpoints."""

import asyncio
import json
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vllm_omni import AsyncOmni, Omni
from vllm_omni.diffusion.tiny_models import make_tiny_model
from vllm_omni.errors import ConfigError, RequestAborted, RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.outputs import OmniRequestOutput

SMALL: dict[str, Any] = {"height": 64, "width": 48, "num_inference_steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Omni]:
    """FLUX.1, one engine for all tests here."""
    with Omni(str(make_tiny_model("flux", tmp_path_factory.mktemp("flux"))), max_num_seqs=4) as omni:
        yield omni


@pytest.fixture(scope="module")
def qwen_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Omni]:
    """Qwen-Image."""
    with Omni(str(make_tiny_model("qwen-image", tmp_path_factory.mktemp("qwen")))) as omni:
        yield omni


def run(omni: Omni, prompts: Any, *args: Any, **kwargs: Any) -> list[OmniRequestOutput]:
    outputs = omni.generate(prompts, *args, use_tqdm=False, **kwargs)
    assert isinstance(outputs, list)
    return outputs


def pixels(output: OmniRequestOutput) -> bytes:
    return b"".join(image.tobytes() for image in output.images)


def difference(one: OmniRequestOutput, other: OmniRequestOutput) -> int:
    """Largest difference of a pixel, in 255ths."""
    return int(np.abs(np.asarray(one.images[0], int) - np.asarray(other.images[0], int)).max())


def test_a_picture(flux: Omni) -> None:
    (output,) = run(flux, "a cup of coffee on the table", OmniDiffusionSamplingParams(**SMALL))
    (image,) = output.images
    assert isinstance(image, Image.Image)
    assert image.size == (48, 64)
    assert output.request_output is not None
    assert output.request_output[0].images[0] is image  # type: ignore[index]
    assert output.outputs[0] is image
    assert isinstance(output.request_output[0], OmniRequestOutput)  # type: ignore[index]
    assert (output.final_output_type, output.stage_id, output.finished) == ("image", 0, True)
    assert output.metrics["seed"] == 5
    assert output.metrics["num_inference_steps"] == 2
    assert output.metrics["stages"]["0"]["run_s"] > 0
    assert len(set(image.tobytes())) > 4, "a picture, not one colour"


def test_a_seed_gives_the_same_picture_alone_and_in_company(flux: Omni) -> None:
    (alone,) = run(flux, "a red square", **SMALL)
    several = run(flux, ["a red square", "a dog", "a red square"], **SMALL)
    for output in (several[0], several[2]):
        assert difference(output, alone) <= 1
    assert difference(several[1], alone) > 1
    (other,) = run(flux, "a red square", **{**SMALL, "seed": 6})
    assert difference(other, alone) > 1


def test_a_generator_survives_the_way_to_the_stage(flux: Omni) -> None:
    params = {name: value for name, value in SMALL.items() if name != "seed"}
    (given,) = run(flux, "x", generator=torch.Generator("cpu").manual_seed(5), **params)
    (seeded,) = run(flux, "x", **SMALL)
    assert pixels(given) == pixels(seeded)


def test_several_pictures_of_a_prompt(flux: Omni) -> None:
    (output,) = run(flux, "x", num_outputs_per_prompt=2, **SMALL)
    assert output.num_images == 2
    assert output.images[0].tobytes() != output.images[1].tobytes()


@pytest.mark.parametrize(("kind", "cls"), [("np", np.ndarray), ("pt", torch.Tensor)])
def test_other_forms_of_a_picture(flux: Omni, kind: str, cls: type) -> None:
    (output,) = run(flux, "x", output_type=kind, **SMALL)
    assert isinstance(output.images[0], cls)
    assert 64 in output.images[0].shape
    assert 48 in output.images[0].shape


def test_latents(flux: Omni) -> None:
    (output,) = run(flux, "x", output_type="latent", **SMALL)
    assert isinstance(output.latents, torch.Tensor)
    (again,) = run(flux, "x", output_type="latent", **SMALL)
    assert torch.equal(output.latents, again.latents)


def test_a_bad_request_among_good_ones(flux: Omni) -> None:
    with pytest.raises(RequestError) as caught:
        run(flux, ["good", {"prompt": "bad", "multi_modal_data": {"image": Image.new("RGB", (8, 8))}}], **SMALL)
    assert [output.prompt for output in caught.value.outputs] == ["good"]
    with pytest.raises(RequestError, match="nonsense"):
        run(flux, "x", OmniDiffusionSamplingParams(extra_args={"nonsense": 1}, **SMALL))
    with pytest.raises(RequestError, match="additional_information: unknown key 'speaker'; the model reads none"):
        run(flux, {"prompt": "x", "additional_information": {"speaker": "Ethan"}}, **SMALL)
    assert len(run(flux, "the engine goes on", **SMALL)) == 1


def test_steps_are_shown_and_an_abort_takes_effect_between_them(flux: Omni) -> None:
    """A long request is aborted from the progress bar's own update."""
    started = threading.Event()

    class Bar:
        def __init__(self, total: int, desc: str) -> None:
            assert (total, desc) == (1000, "Steps")
            self.n = 0

        def update(self, count: int) -> None:
            self.n += count
            started.set()

        def close(self) -> None:
            assert 0 < self.n < 1000

    failed: list[BaseException] = []
    params = {**SMALL, "num_inference_steps": 1000}
    stream = flux.generate("x", py_generator=True, use_tqdm=Bar, **params)
    assert isinstance(stream, Generator)

    def drain() -> None:
        try:
            list(stream)
        except RequestAborted as error:
            failed.append(error)

    thread = threading.Thread(target=drain)
    thread.start()
    assert started.wait(60)
    flux._loop.call_soon(lambda: [flux._async.orchestrator.abort(key) for key in list(flux._async.orchestrator._flows)])
    thread.join(20)
    assert len(failed) == 1
    assert len(run(flux, "the engine goes on", **SMALL)) == 1


def test_requests_with_different_steps_share_the_engine(flux: Omni) -> None:
    async def both(engine: AsyncOmni) -> tuple[list[str], list[OmniRequestOutput]]:
        finished: list[str] = []

        async def one(name: str, steps: int) -> OmniRequestOutput:
            params = OmniDiffusionSamplingParams(**{**SMALL, "num_inference_steps": steps})
            (output,) = [output async for output in engine.generate("x", name, params)]
            finished.append(name)
            return output

        outputs = await asyncio.gather(one("long", 40), one("short", 2))
        return finished, list(outputs)

    finished, (long, short) = flux._loop.run(both(flux._async))
    assert finished == ["short", "long"], "a short request does not wait for a long one"
    (alone,) = run(flux, "x", **SMALL)
    assert difference(short, alone) <= 1
    assert long.request_id == "long"


def test_profile_writes_a_trace(flux: Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TORCH_PROFILER_DIR", str(tmp_path))
    flux.start_profile()
    run(flux, "x", **SMALL)
    (files,) = flux.stop_profile().values()
    assert files
    for file in files:
        assert Path(file).is_relative_to(tmp_path / "stage_0")
        assert Path(file).stat().st_size > 1000
    if files[0].endswith(".json"):
        assert json.loads(Path(files[0]).read_text())["traceEvents"]


def test_health(flux: Omni) -> None:
    flux.check_health()
    assert flux.is_running


def test_qwen_image_with_and_without_a_negative_prompt(qwen_image: Omni) -> None:
    small = {**SMALL, "true_cfg_scale": 4.0}
    (plain,) = run(qwen_image, "a house", **SMALL)
    (guided,) = run(qwen_image, "a house", negative_prompts="blurry", **small)
    (again,) = run(qwen_image, {"prompt": "a house", "negative_prompt": "blurry"}, **small)
    assert plain.images[0].size == (48, 64)
    assert pixels(guided) == pixels(again) != pixels(plain)


def test_settings_that_the_model_cannot_honour_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_model("flux", tmp_path / "m")
    with pytest.raises(ConfigError) as caught:
        Omni(str(folder), tensor_parallel_size=7)
    assert "7" in caught.value.message
    with pytest.raises(ConfigError, match="NoSuchPipeline"):
        Omni(str(folder), model_class_name="NoSuchPipeline")
