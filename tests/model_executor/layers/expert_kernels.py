"""The kernels of a mixture of experts give what plain PyTorch gives. Triton's interpreter runs them for
``test_dense_kernels``, which has one process for all; on a GPU see ``tests/gpu/test_experts.py``."""

import torch

from vllm_omni.model_executor.layers.experts import ExpertPlan, Experts, plain_experts


def draw(hidden: int, inner: int, shared: int, top_k: int, renormalise: bool, count: int, device: str) -> Experts:
    """A layer in which every weight matters."""
    torch.manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * shape[-1] ** -0.5).bfloat16()

    routed = weight(count, hidden), weight(count, 2 * inner, hidden), weight(count, hidden, inner)
    if not shared:
        return Experts(*routed, top_k, renormalise)
    return Experts(
        *routed, top_k, renormalise, weight(2 * shared, hidden), weight(hidden, shared), 3 * weight(1, hidden)
    )


def compare(device: str, sizes: tuple[int, int, int, int, bool, int], rows: int, plan: ExpertPlan | None) -> None:
    from vllm_omni.model_executor.layers.expert_kernels import run_experts

    experts = draw(*sizes, device)
    assert experts.unfit() is None
    x = torch.randn(rows, sizes[0], device=device).bfloat16()
    (want, want_shared), (got, got_shared) = plain_experts(x, experts), run_experts(x, experts, plan)
    torch.testing.assert_close(got.float(), want, atol=0.01, rtol=0.02)
    assert want.abs().mean() > 0.05
    assert (want_shared is None) == (got_shared is None)
    if want_shared is not None and got_shared is not None:
        torch.testing.assert_close(got_shared.float(), want_shared, atol=0.01, rtol=0.02)


def compare_all() -> None:
    """With a shared expert and without, shares that add up to 1 and not; on a CPU."""
    compare("cpu", (128, 64, 128, 2, False, 8), 3, ExpertPlan(up_columns=16, down_columns=32))
    compare("cpu", (256, 64, 0, 3, True, 4), 2, ExpertPlan(up_columns=32, down_columns=64))
