"""The activations of vocoders as kernels give what PyTorch gives (in Triton's interpreter: ``test_dense_kernels``)."""

import pytest
import torch

from vllm_omni.model_executor.layers.snake import SnakeBeta, fuse_snakes
from vllm_omni.model_executor.models.qwen2_5_omni.bigvgan import AntiAliasedSnake


def compare(device: str) -> None:
    """Lengths below the filters' reach, of a block and beyond it."""
    torch.manual_seed(0)
    module = AntiAliasedSnake(3)
    for parameter in module.parameters():
        parameter.data.normal_()
    module, plain = module.to(device), SnakeBeta(3).to(device)
    plain.load_state_dict(module.act.state_dict())
    for length in (1, 2, 7, 40, 600):
        x = torch.randn(2, 3, length, device=device)
        want, want_plain = module.plain(x), plain(x.clone())
        module.fused = plain.fused = True
        got, got_plain = module(x), plain(x)
        module.fused = plain.fused = False
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got_plain, want_plain, atol=1e-5, rtol=1e-5)
    assert fuse_snakes(torch.nn.Sequential(plain)) is None
    assert plain.fused


@pytest.mark.gpu
@torch.inference_mode()
def test_kernels() -> None:
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    compare("cuda")
    torch.backends.cudnn.allow_tf32 = allowed
