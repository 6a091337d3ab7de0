"""CUDA graphs of functions that keep their tensors give what the function gives."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_omni.model_executor.layers.graphed import GraphedRows, batch_sizes
from vllm_omni.model_executor.layers.sampling import Rules, TokenSampler
from vllm_omni.model_executor.models.qwen3_omni.code_predictor import CodePredictor
from vllm_omni.model_executor.models.qwen3_omni.frame import FrameMaker

CONFIG = SimpleNamespace(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    num_code_groups=8,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_theta": 10000.0},
)
VOCABULARY, ROWS = 512, 6


def test_batch_sizes() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(8) == [1, 2, 4, 8]
    assert batch_sizes(12) == [1, 2, 4, 8, 12]


def test_without_a_capture_the_function_runs() -> None:
    values = torch.ones(4)
    double = GraphedRows(lambda batch: (values[:batch] * 2,))
    assert double.sizes == []
    assert double(3)[0].tolist() == [2, 2, 2]


def frames(dtype: torch.dtype) -> FrameMaker:
    """The same weights every time."""
    torch.manual_seed(0)
    predictor = CodePredictor(CONFIG).to("cuda", dtype)
    table, head = torch.randn(2, VOCABULARY, CONFIG.hidden_size, device="cuda", dtype=dtype).unbind()
    with torch.device("cuda"):
        tokens = TokenSampler(ROWS, VOCABULARY, 16)
        made = FrameMaker(tokens, predictor, lambda ids: table[ids], lambda hidden: hidden @ head.T * 0.05, dtype)
    for slot in range(ROWS):
        tokens.open(slot, np.arange(slot * 50, slot * 50 + 50, dtype=np.int32), 0, slot, [3, 4])
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_frames_as_graphs(dtype: torch.dtype) -> None:
    """Padded to a captured size, beyond the largest one, greedy and drawn rows, first codes given in between; results
    outlive the next call and the tokens are kept."""
    plain, graphed = frames(dtype), frames(dtype)
    graphed.capture([1, 2, 4])
    kept = []
    padded = 3 if dtype == torch.float32 else 4  # other sizes round otherwise, which only float32 does not show
    for step, batch in enumerate((4, 1, padded, 2, 6, 4, 1)):
        hidden = torch.randn(batch, CONFIG.hidden_size, device="cuda", dtype=dtype)
        given = torch.arange(batch, device="cuda") + 5 if step == 3 else None
        results = []
        for maker in (plain, graphed):
            order = [(row + step) % ROWS for row in range(batch)]
            maker._tokens.arrange([Rules(slot, slot % 2 * 0.8, 50, 0.9, 1.1) for slot in order])
            torch.manual_seed(step)
            results.append(maker(hidden, given, {}))
        kept.append(results)
    for (codes, total), (graphed_codes, graphed_total) in kept:
        assert torch.equal(codes, graphed_codes)
        torch.testing.assert_close(total, graphed_total)
    assert kept[3][1][0][0].tolist() == [5, 6]
    for slot in range(ROWS):
        assert plain._tokens.made(slot, 3) == graphed._tokens.made(slot, 3)
