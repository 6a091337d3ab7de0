"""``AdaLayerNorm`` is diffusers' continuous adaptive norm, with its weights."""

import torch
from diffusers.models.normalization import AdaLayerNormContinuous

from vllm_omni.diffusion.layers.adalayernorm import AdaLayerNorm


def test_equals_the_reference() -> None:
    torch.manual_seed(0)
    reference = AdaLayerNormContinuous(24, 16, elementwise_affine=False, eps=1e-6)
    ours = AdaLayerNorm(24, ada_dim=16)
    ours.load_state_dict(reference.state_dict())
    x, embedding = torch.randn(2, 5, 24), torch.randn(2, 16)
    torch.testing.assert_close(ours(x, embedding), reference(x, embedding))
