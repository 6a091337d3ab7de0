"""Previews between the steps: the map from latents to colours, and what a model that can draw shows of a picture."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.diffusion.helpers import drain, failures, fake_config, request, results
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.models.common.flow_match import clean_estimate, euler_step
from vllm_omni.diffusion.models.common.preview import CROP, LatentToColour, crop, preview_steps
from vllm_omni.engine.stage_engine import StagePreview, StageProgress
from vllm_omni.entrypoints.omni_args import DEFAULT_MODEL
from vllm_omni.outputs import Preview


@pytest.fixture(scope="module")
def painter() -> Iterator[DiffusionEngine]:
    """The model of the package, which draws what one says."""
    engine = DiffusionEngine(OmniDiffusionConfig.from_kwargs(model=str(DEFAULT_MODEL), device="cpu", max_num_seqs=2))
    yield engine
    engine.close()


@pytest.mark.parametrize(
    ("count", "steps", "wanted"),
    [
        (0, 20, []),
        (1, 20, [10]),
        (3, 20, [5, 10, 15]),
        (3, 4, [1, 2, 3]),
        (200, 5, [1, 2, 3, 4]),
        (2, 1, []),
        (5, 2, [1]),
    ],
)
def test_steps_of_previews(count: int, steps: int, wanted: list[int]) -> None:
    assert sorted(preview_steps(count, steps)) == wanted


def test_clean_estimate_is_where_the_solver_would_end() -> None:
    latents, velocity = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.allclose(clean_estimate(latents, velocity, 0.7), euler_step(latents, velocity, 0.7, 0.0))


def test_a_linear_picture_is_learnt_exactly() -> None:
    """Colours that are a linear function of latents and neighbours are found again, also in a picture not seen yet."""
    torch.manual_seed(0)
    mix = torch.randn(3, 4) / 8

    def picture(latents: torch.Tensor) -> torch.Tensor:
        colours = torch.einsum("oc,bchw->bohw", mix, latents) + 0.1
        return colours.repeat_interleave(8, 2).repeat_interleave(8, 3)

    colours = LatentToColour()
    for _ in range(2):
        latents = torch.randn(1, 4, 16, 16)
        colours.learn(latents, picture(latents))
    fresh = torch.randn(2, 4, 12, 20)
    made = colours.render(fresh)
    assert made.shape == (2, 3, 24, 40)
    wanted = torch.nn.functional.avg_pool2d(picture(fresh), 4).clamp(-1, 1)
    assert (made - wanted).abs().max() < 0.02


def test_lessons_are_bounded() -> None:
    assert crop(torch.zeros(3, 4, 200, 30)).shape == (1, 4, CROP, 30)
    colours = LatentToColour()
    assert colours.wants(1, 20, frozenset(range(1, 20)))
    colours.lessons = 1
    taken = [step for step in range(1, 20) if colours.wants(step, 20, frozenset(range(1, 20)))]
    assert taken == [10]
    colours.lessons = 1000
    assert not colours.wants(10, 20, frozenset({10}))


def _distances(events: list[Any], request_id: str) -> list[float]:
    """Mean squared error of each preview from the finished picture."""
    final = np.asarray(results(events)[request_id]["images"][0], dtype=float)
    shown = [event for event in events if isinstance(event, StagePreview) and event.request_id == request_id]
    pictures = [Preview(event.step, event.total, event.images, event.size).pictures()[0] for event in shown]
    return [float(((np.asarray(picture, dtype=float) - final) ** 2).mean()) for picture in pictures]


def test_previews_become_the_picture(painter: DiffusionEngine) -> None:
    """Late previews are nearer to the picture than early ones; what is learnt from one picture helps with the next."""
    prompts = ["a red circle above a blue square", "a green triangle on a white background", "two purple stars"]
    for number, prompt in enumerate(prompts):
        painter.add_request(request(str(number), prompt, seed=number, num_previews=5))
        events = drain(painter)
        assert [event.step for event in events if isinstance(event, StagePreview)] == [3, 7, 10, 13, 17]
        distances = _distances(events, str(number))
        assert distances[-1] < 0.8 * distances[0], distances
        final = np.asarray(results(events)[str(number)]["images"][0], dtype=float)
        assert distances[-1] < 0.5 * final.var((0, 1)).mean(), "the shapes are where they will be"


def test_order_and_form(painter: DiffusionEngine) -> None:
    """A preview follows its step's progress; each picture of a request has its own; others get none."""
    painter.add_request(
        request("seen", "a star", seed=1, num_inference_steps=4, num_outputs_per_prompt=2, num_previews=9)
    )
    painter.add_request(request("unseen", "a star", seed=1, num_inference_steps=4))
    events = drain(painter)
    mine = [event for event in events if event.request_id == "seen"]
    kinds = [(type(event).__name__, event.step) for event in mine if isinstance(event, (StagePreview, StageProgress))]
    assert kinds == [
        *(("StageProgress", 1), ("StagePreview", 1), ("StageProgress", 2), ("StagePreview", 2)),
        *(("StageProgress", 3), ("StagePreview", 3), ("StageProgress", 4)),
    ]
    preview = next(event for event in mine if isinstance(event, StagePreview))
    (image, _) = results(events)["seen"]["images"]
    assert (preview.images.dtype, preview.size) == (np.uint8, image.size)
    pictures, height, width, colours = preview.images.shape
    assert (pictures, colours) == (2, 3)
    assert image.width / width == image.height / height >= 2, "smaller than the picture, of its shape"
    assert not [event for event in events if isinstance(event, StagePreview) and event.request_id == "unseen"]


def test_a_preview_changes_nothing(painter: DiffusionEngine) -> None:
    pictures = []
    for number in (0, 5):
        painter.add_request(request(f"n{number}", "a blue circle", seed=3, num_previews=number))
        pictures.append(np.asarray(results(drain(painter))[f"n{number}"]["images"][0]))
    assert np.array_equal(*pictures)


def test_a_preview_costs_little(painter: DiffusionEngine) -> None:
    """Once learnt, a preview after every step adds less than a fifth even to these tiny steps (best of two)."""

    def seconds(previews: int) -> float:
        taken = []
        for number in range(2):
            ask = request(f"{previews}-{number}", "a circle", seed=3, num_inference_steps=10, num_previews=previews)
            painter.add_request(ask)
            begun = time.perf_counter()
            drain(painter)
            taken.append(time.perf_counter() - begun)
        return min(taken)

    painter.add_request(request("warm", "a circle", seed=3, num_inference_steps=2, num_previews=1))
    drain(painter)
    colours = painter._executor._alive().worker.model_runner.pipeline.colours  # type: ignore[attr-defined]
    colours.lessons = 1000
    assert seconds(9) < 1.2 * seconds(0) + 0.05


def test_a_pipeline_without_previews_refuses_them() -> None:
    engine = DiffusionEngine(fake_config())
    try:
        engine.add_request(request("a", num_previews=2))
        error = failures(drain(engine))["a"]
        assert error.details["field"] == "num_previews"
    finally:
        engine.close()
