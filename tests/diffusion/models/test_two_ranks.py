"""Two ranks make the picture of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.diffusion.parity import STEPS, assert_same_latents, assert_same_pictures
from tests.diffusion.rank_runs import RANK_KINDS, denoise, local_parameters
from vllm_omni.diffusion.models.common.images import postprocess_images
from vllm_omni.diffusion.models.common.latents import unpack_2x2

FAMILIES = ("flux", "qwen-image")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", RANK_KINDS)
def test_same_latents_and_picture(
    kind: str, family: str, two_ranks: dict[str, list[dict[str, Any]]], our_pipe: Callable[[str], Any]
) -> None:
    ours = our_pipe(family)
    expected = denoise(ours)
    ranks = [result[family]["latents"] for result in two_ranks[kind]]
    for i, latents in enumerate(expected):
        assert torch.equal(ranks[0][i], ranks[1][i])
        assert_same_latents(ranks[0][i], latents)

        def show(x: torch.Tensor) -> list[Any]:
            with torch.no_grad():
                return list(postprocess_images(ours.decode_latents(unpack_2x2(x, (4, 4)))))

        assert_same_pictures(show(ranks[0][i]), show(latents))


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_share_the_work(
    family: str, two_ranks: dict[str, list[dict[str, Any]]], our_pipe: Callable[[str], Any]
) -> None:
    """Tensor parallel: half of the modulation's weights each. CFG parallel: one branch of the batch each."""
    whole = local_parameters(our_pipe(family))
    assert [result[family]["params"] for result in two_ranks["tensor_parallel_size"]] == [whole // 2] * 2
    guided, plain = [2] * STEPS, [1] * STEPS
    assert [result[family]["rows"] for result in two_ranks["cfg_parallel_size"]] == [guided + plain] * 2
    assert [result[family]["rows"] for result in two_ranks["tensor_parallel_size"]] == [[4] * STEPS + plain] * 2
