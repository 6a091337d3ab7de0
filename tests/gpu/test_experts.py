"""Mixtures of experts of Qwen3-Omni in full size: this package's kernels beside vLLM's own path."""

import pytest
import torch

from benchmarks.moe_layers import TALKER, THINKER, Sizes, layers
from vllm_omni.model_executor.layers.experts import plain_experts
from vllm_omni.model_executor.layers.graphed import record

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("sizes", [TALKER, THINKER], ids=["talker", "thinker"])
@torch.inference_mode()
def test_kernels_give_what_vllm_gives(sizes: Sizes) -> None:
    """Every number of rows that runs on them, against float32, and no further off than vLLM's; in a graph as well."""
    torch.manual_seed(0)
    with layers(sizes, 1, torch.device("cuda")) as (block,):
        runner = block.experts
        assert runner.few_rows >= 1
        rows, experts = runner.few_rows, runner.weights()
        for count in range(1, rows + 1):
            x = torch.randn(count, sizes.hidden, device="cuda", dtype=torch.bfloat16)
            routed, shared = plain_experts(x, experts)
            want = routed if shared is None else routed + shared
            got = block(x).float()
            runner.few_rows = 0
            vllm = block(x).float()
            runner.few_rows = rows
            scale = want.norm()
            assert float((got - want).norm() / scale) <= max(0.01, 1.5 * float((vllm - want).norm() / scale))
            graph, again = record(lambda: block(x), None)  # noqa: B023
            graph.replay()
            assert torch.equal(again.float(), got)
        assert not torch.equal(got, vllm)  # the two are two


@torch.inference_mode()
def test_a_chosen_backend_is_kept() -> None:
    with layers(TALKER, 1, torch.device("cuda")) as (block,):
        block.experts.moe_config.moe_backend = "triton"
        assert block.experts.weights() == "moe_backend='triton'"
