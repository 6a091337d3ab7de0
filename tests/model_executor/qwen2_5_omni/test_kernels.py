"""The flow with kernels gives what PyTorch gives: in Triton's interpreter, and with the released sizes on a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.model_executor.interpreted import interpret, without_gpu
from vllm_omni.model_executor.models.qwen2_5_omni.dit import CodecDiT
from vllm_omni.model_executor.models.qwen2_5_omni.flow import FlowInput, FlowSettings, MelSampler

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 24,
    "ff_mult": 2,
    "emb_dim": 16,
    "num_embeds": 20,
    "mel_dim": 16,
    "block_size": 10,
    "look_ahead_layers": [1],
    "look_backward_layers": [0, 1],
    "repeats": 2,
    "rope_parameters": {"rope_theta": 10000.0},
    "enc_dim": 8,
    "enc_emb_dim": 12,
    "enc_channels": [16, 16, 16, 16, 48],
    "enc_kernel_sizes": [5, 3, 3, 3, 1],
    "enc_dilations": [1, 2, 3, 4, 1],
    "enc_attention_channels": 8,
    "enc_res2net_scale": 2,
    "enc_se_channels": 8,
}
FULL = {
    **TINY,
    "hidden_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "head_dim": 64,
    "mel_dim": 80,
    "block_size": 24,
}


def draw(config: dict[str, Any], device: str) -> CodecDiT:
    """A flow whose result depends on everything."""
    torch.manual_seed(0)
    dit = CodecDiT(SimpleNamespace(**config))
    for parameter in dit.parameters():
        parameter.data.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
    return dit.to(device)


def requests(dit: CodecDiT, frames: tuple[int, ...], device: str) -> list[FlowInput]:
    """Requests with random conditions."""
    width, mel = dit.config.hidden_size, dit.config.mel_dim
    return [FlowInput(*torch.randn(2, n, width, device=device), torch.randn(n, mel, device=device)) for n in frames]


def compare(config: dict[str, Any], device: str) -> None:
    """Full and padded blocks, first, middle and last ones, two conditions."""
    dit = draw(config, device)
    size, frames = config["block_size"], [1, 2 * config["block_size"] + 1]
    layout = dit.layout(frames * 2)
    blocks = len(layout.cos) // 2
    x = torch.randn(blocks, size, config["mel_dim"], device=device)
    condition = torch.randn(2 * blocks, size, config["hidden_size"], device=device)
    modulation = dit.modulations(torch.tensor([0.3], device=device))
    rows = [row[0] for row in modulation[0]], modulation[1][0]
    want = dit(x, condition, rows, layout)
    assert dit.use_kernels() == None  # noqa: E711 - shows why not
    assert dit.fused
    off = (dit(x, condition, rows, layout) - want).abs()[layout.mask(False, False)[:, 0, 0]].max()
    assert off < 1e-4 * want.abs().max()


@without_gpu
def test_interpreted_kernels() -> None:
    interpret("from tests.model_executor.qwen2_5_omni.test_kernels import TINY, compare; compare(TINY, 'cpu')")


@torch.inference_mode()
def test_tables_are_kept_for_a_few_settings() -> None:
    """Steps that are computed one by one are those of the table; memory does not grow with the settings asked for."""
    dit = draw(TINY, "cpu")
    sampler = MelSampler(dit)
    long = FlowSettings(num_steps=40)
    rows, sizes = zip(*sampler._steps(long), strict=True)
    assert not sampler._tables
    want_rows, want_sizes = sampler._table(long.times())
    torch.testing.assert_close(torch.stack(rows), want_rows, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(sizes), want_sizes)
    for steps in (2, 3, 4, 5, 2, 6, 7):
        assert len(list(sampler._steps(FlowSettings(num_steps=steps)))) == steps - 1
    assert [settings.num_steps for settings in sampler._tables] == [5, 2, 6, 7]


@pytest.mark.gpu
@torch.inference_mode()
def test_kernels() -> None:
    compare(TINY, "cuda")
    compare(FULL, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@torch.inference_mode()
def test_graphs(fused: bool) -> None:
    """Fewer blocks than captured, as many, and more than any; guided and not; results outlive the next call."""
    dit = draw(FULL, "cuda")
    if fused:
        assert dit.use_kernels() == None  # noqa: E711 - shows why not
    plain, graphed = MelSampler(dit), MelSampler(dit)
    graphed.capture([2, 6])
    assert graphed.sizes == [2, 6]
    kept = []
    for frames in ((30,), (48,), (24, 50), (24,) * 6, (24,) * 9):
        batch = requests(dit, frames, "cuda")
        for guidance in (0.5, 0.0):
            settings = FlowSettings(num_steps=3, guidance_scale=guidance)
            kept.append((graphed.sample(batch, settings), plain.sample(batch, settings)))
    for got, want in kept:
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
