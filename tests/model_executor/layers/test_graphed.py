"""CUDA graphs of batched functions give what the function gives."""

from types import SimpleNamespace

import pytest
import torch

from vllm_omni.model_executor.layers.graphed import GraphedBatch, batch_sizes
from vllm_omni.model_executor.models.qwen3_omni.code_predictor import CodePredictor

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


def test_batch_sizes() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(8) == [1, 2, 4, 8]
    assert batch_sizes(12) == [1, 2, 4, 8, 12]


def test_without_a_capture_the_function_runs() -> None:
    double = GraphedBatch(lambda x: (x * 2,))
    assert double.sizes == []
    assert double(torch.ones(3))[0].tolist() == [2, 2, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_the_code_predictor_as_graphs(dtype: torch.dtype) -> None:
    """Padded to a captured size, beyond the largest one, greedy and drawn rows; results outlive the next call."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    predictor = CodePredictor(CONFIG).to(device, dtype)
    graphed = GraphedBatch(predictor)
    row = torch.zeros(1, CONFIG.hidden_size, device=device, dtype=dtype)
    graphed.capture([1, 4], (row, row, torch.ones(1, dtype=torch.bool, device=device), predictor.noise(1, {}, device)))
    kept = []
    for batch in (1, 3, 4, 6):
        hidden, first = torch.randn(2, batch, CONFIG.hidden_size, device=device, dtype=dtype).unbind()
        greedy = torch.arange(batch, device=device) % 2 == 0
        inputs = (hidden, first, greedy, predictor.noise(batch, {}, device))
        want = predictor(*(_to_four(inputs) if 1 < batch < 4 else inputs))
        got = graphed(*inputs)
        kept.append((got, [value[:batch] for value in want]))
    for got, expected in kept:
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def _to_four(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat([value, value[:1].expand(4 - len(value), *value.shape[1:])]) for value in inputs)
