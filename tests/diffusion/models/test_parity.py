"""The same tiny checkpoint gives the same latents and the same picture in diffusers and in ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.diffusion.parity import (
    assert_same_latents,
    assert_same_pictures,
    batched_run,
    load_ours,
    load_reference,
    pictures,
    reference_run,
    relative_error,
    request,
    solo_run,
    start,
)
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.models.common.images import postprocess_images

Pipes = Callable[[str], Any]
FAMILIES = ("flux", "flux-schnell", "qwen-image")
PROMPTS = ("a red fox", "A cup of coffee on the table, morning light, a photograph with great detail.", "two cats")
GUIDED = {"negative": "blurry, low quality", "true_cfg_scale": 3.0}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "cfg"])
@pytest.mark.parametrize("size", [(64, 64), (48, 96)], ids=["square", "wide"])
def test_one_prompt(family: str, guided: bool, size: tuple[int, int], reference_pipe: Pipes, our_pipe: Pipes) -> None:
    req = request(PROMPTS[0], seed=7, height=size[0], width=size[1], **(GUIDED if guided else {}))
    reference, ours = reference_pipe(family), our_pipe(family)
    assert_same_latents(solo_run(ours, req), reference_run(reference, [req]))
    made = pictures(ours, req)
    assert made[0].size == (size[1], size[0])
    assert_same_pictures(made, reference_run(reference, [req], "pil"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "cfg"])
def test_three_prompts_together_and_one_by_one(
    family: str, guided: bool, reference_pipe: Pipes, our_pipe: Pipes
) -> None:
    """Texts of different length share a forward; each result is that of the request alone."""
    reqs = [request(text, seed=i, **(GUIDED if guided else {})) for i, text in enumerate(PROMPTS)]
    ours = our_pipe(family)
    expected = reference_run(reference_pipe(family), reqs)
    states = batched_run(ours, reqs)
    for i, (req, state) in enumerate(zip(reqs, states, strict=True)):
        assert_same_latents(state.latents, expected[i : i + 1])
        assert_same_latents(solo_run(ours, req), expected[i : i + 1])
    shown = [picture for state in states for picture in postprocess_images(ours.decode(state).output)]
    assert_same_pictures(shown, reference_run(reference_pipe(family), reqs, "pil"))


@pytest.mark.parametrize("family", FAMILIES)
def test_three_prompts_in_one_request(family: str, reference_pipe: Pipes, our_pipe: Pipes) -> None:
    """One generator draws the noise of the whole request, as in diffusers."""
    req = replace(request(PROMPTS[0], seed=5), prompts=list(PROMPTS))
    assert_same_latents(solo_run(our_pipe(family), req), reference_run(reference_pipe(family), [req]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_different_requests_equals_solo_runs(family: str, our_pipe: Pipes) -> None:
    """Steps, seeds, guidance, text length and number of pictures differ within one batch."""
    ours = our_pipe(family)
    reqs = [
        request(PROMPTS[0], "blurry", seed=1, num_inference_steps=2, true_cfg_scale=2.0),
        request(PROMPTS[1], "bad hands, text", seed=2, num_inference_steps=5, true_cfg_scale=4.0),
        request(PROMPTS[2], "x", seed=3, sigmas=[1.0, 0.6, 0.3], true_cfg_scale=3.0, num_outputs_per_prompt=2),
    ]
    reqs[1].sampling_params.max_sequence_length = 40
    if family == "flux":
        for req, scale in zip(reqs, (1.0, 3.5, 7.0), strict=True):
            req.sampling_params.guidance_scale = scale
    for req, state in zip(reqs, batched_run(ours, reqs), strict=True):
        assert_same_latents(state.latents, solo_run(ours, req), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "params",
    [
        {"num_outputs_per_prompt": 2},
        {"sigmas": [1.0, 0.7, 0.4, 0.1]},
        {"max_sequence_length": 7},
        {"num_inference_steps": 6},
    ],
    ids=lambda params: next(iter(params)),
)
def test_parameters(family: str, params: dict[str, Any], reference_pipe: Pipes, our_pipe: Pipes) -> None:
    req = request(PROMPTS[1], seed=11, **params)
    ours = our_pipe(family)
    assert_same_latents(solo_run(ours, req), reference_run(reference_pipe(family), [req]))
    plain = solo_run(ours, request(PROMPTS[1], seed=11))
    assert solo_run(ours, req).shape != plain.shape or relative_error(solo_run(ours, req), plain) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step(family: str, reference_pipe: Pipes, our_pipe: Pipes) -> None:
    """One step from noise to picture; the reference has no numbers for Qwen-Image there (0 / 0 in its schedule)."""
    req = request(PROMPTS[0], seed=1, num_inference_steps=1)
    ours = solo_run(our_pipe(family), req)
    if family == "qwen-image":
        assert torch.isfinite(ours).all()
        assert start(our_pipe(family), req).sigmas.tolist() == [1.0, 0.0]
    else:
        assert_same_latents(ours, reference_run(reference_pipe(family), [req]))


@pytest.mark.parametrize("family", FAMILIES)
def test_given_latents(family: str, reference_pipe: Pipes, our_pipe: Pipes) -> None:
    latents = torch.randn((1, 16, 64), generator=torch.Generator().manual_seed(1))
    req = request(PROMPTS[0], latents=latents)
    assert_same_latents(solo_run(our_pipe(family), req), reference_run(reference_pipe(family), [req]))


def test_generators(our_pipe: Pipes) -> None:
    """A generator gives the noise of its seed; a list gives each picture its own."""
    ours = our_pipe("qwen-image")
    one = [solo_run(ours, request(PROMPTS[0], generator=torch.Generator().manual_seed(s))) for s in (3, 4)]
    assert torch.equal(one[0], solo_run(ours, request(PROMPTS[0], seed=3)))
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    both = solo_run(ours, request(PROMPTS[0], generator=generators, num_outputs_per_prompt=2))
    assert_same_latents(both, torch.cat(one), 1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.5, 6.0])
def test_embedded_guidance(scale: float, reference_pipe: Pipes, our_pipe: Pipes) -> None:
    req = request(PROMPTS[0], seed=2, guidance_scale=scale)
    assert_same_latents(solo_run(our_pipe("flux"), req), reference_run(reference_pipe("flux"), [req]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_input_moves_the_result(family: str, our_pipe: Pipes) -> None:
    """The tiny checkpoints are not degenerate: what should matter does."""
    ours = our_pipe(family)
    base = solo_run(ours, request(PROMPTS[0], seed=1, **GUIDED))
    others = {
        "prompt": request(PROMPTS[2], seed=1, **GUIDED),
        "negative prompt": request(PROMPTS[0], "a dog", seed=1, true_cfg_scale=3.0),
        "guidance": request(PROMPTS[0], GUIDED["negative"], seed=1, true_cfg_scale=1.5),
        "no guidance": request(PROMPTS[0], seed=1),
        "seed": request(PROMPTS[0], seed=2, **GUIDED),
    }
    if family == "flux":
        others["embedded guidance"] = request(PROMPTS[0], seed=1, guidance_scale=1.0, **GUIDED)
    for name, req in others.items():
        assert relative_error(solo_run(ours, req), base) > 2e-3, name


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_in_turn_equals_guidance_in_one_forward(
    family: str, our_pipe: Pipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = our_pipe(family)
    req = request(PROMPTS[1], seed=4, **GUIDED)
    together = solo_run(ours, req)
    forwards = []
    handle = ours.transformer.register_forward_hook(lambda *_: forwards.append(1))
    monkeypatch.setattr(type(ours), "cfg_batch_tokens", 0)
    in_turn = solo_run(ours, req)
    handle.remove()
    assert len(forwards) == 2 * req.sampling_params.num_inference_steps
    assert_same_latents(in_turn, together, 1e-5)


@pytest.mark.parametrize(("family", "size"), [("flux", (128, 160)), ("qwen-image", (272, 320))])
def test_vae_tiling(family: str, size: tuple[int, int], tiny_folder: Callable[[str], Path]) -> None:
    """Larger than one tile of the VAE: the same seams as diffusers', and not the untiled picture."""
    req = request(PROMPTS[0], seed=1, height=size[0], width=size[1], num_inference_steps=2)
    reference = load_reference(tiny_folder(family))
    plain = reference_run(reference, [req], "pil")
    reference.vae.enable_tiling()
    tiled = reference_run(reference, [req], "pil")
    ours = load_ours(tiny_folder(family), vae_use_tiling=True)
    try:
        assert_same_pictures(pictures(ours, req), tiled)
        assert plain[0].tobytes() != tiled[0].tobytes()
    finally:
        parallel_state.destroy_parallel()


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
def test_vae_slicing(family: str, tiny_folder: Callable[[str], Path], reference_pipe: Pipes) -> None:
    """Pictures are decoded one at a time, and are the same."""
    ours = load_ours(tiny_folder(family), vae_use_slicing=True)
    try:
        rows: list[int] = []
        ours.vae.decoder.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
        req = request(PROMPTS[0], seed=1, num_outputs_per_prompt=3)
        assert_same_pictures(pictures(ours, req), reference_run(reference_pipe(family), [req], "pil"))
        assert rows == [1, 1, 1]
    finally:
        parallel_state.destroy_parallel()


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
def test_output_types(family: str, reference_pipe: Pipes, our_pipe: Pipes) -> None:
    req = request(PROMPTS[0], seed=1)
    raw = our_pipe(family)(req).output
    for output_type in ("np", "pt"):
        mine = torch.as_tensor(postprocess_images(raw, output_type))
        theirs = torch.as_tensor(reference_run(reference_pipe(family), [req], output_type))
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() < 1e-3


def test_trajectory(our_pipe: Pipes) -> None:
    """Latents after each step, with the timesteps that led there; the last are the final ones."""
    ours = our_pipe("flux")
    out = ours(request(PROMPTS[0], seed=1, return_trajectory_latents=True, output_type="latent"))
    assert out.trajectory_latents.shape == (3, 1, 16, 64)
    assert out.trajectory_timesteps.tolist() == start(ours, request(PROMPTS[0], seed=1)).timesteps.tolist()
    assert torch.equal(out.trajectory_latents[-1], out.output)
    assert relative_error(out.trajectory_latents[0], out.trajectory_latents[1]) > 1e-3


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
def test_bfloat16_keeps_the_references_order_of_casts(family: str, tiny_folder: Callable[[str], Path]) -> None:
    """Nearer to the reference in bfloat16 than that is to itself in float32."""
    req = request(PROMPTS[0], seed=7, **GUIDED)
    exact = reference_run(load_reference(tiny_folder(family)), [req])
    reference = reference_run(load_reference(tiny_folder(family), torch.bfloat16), [req])
    ours = load_ours(tiny_folder(family), dtype="bfloat16")
    try:
        mine = solo_run(ours, req)
    finally:
        parallel_state.destroy_parallel()
    assert mine.dtype == torch.bfloat16
    assert relative_error(mine, reference) < min(0.03, 0.1 * relative_error(reference, exact))
