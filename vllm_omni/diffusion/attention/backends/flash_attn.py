"""FlashAttention: the fastest kernels on NVIDIA GPUs.

Which build is used, first that fits: vLLM's own FlashAttention 3 (Hopper), the ``flash-attn`` package, vLLM's own
FlashAttention 2. They take no mask, so:

- keys that count are the first ones of each row (``key_lengths_B``; batches of texts of different length): FA3 reads
  the lengths itself, nothing is unpadded and every shape stays static;
- lengths with an FA2 build, or any other mask: this call runs on SDPA.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionMetadata
from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend


@functools.cache
def _build() -> str | None:
    """``vllm_fa3``, ``flash_attn``, ``vllm_fa2``, or None when there is none for this GPU."""
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    if is_fa_version_supported(3):
        return "vllm_fa3"
    if importlib.util.find_spec("flash_attn") is not None:
        return "flash_attn"
    return "vllm_fa2" if is_fa_version_supported(2) else None


@functools.lru_cache(maxsize=64)
def _row_starts(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """[0, length, 2 length, ...]: where each row begins when rows of equal length lie end to end."""
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


def _flash_attention(
    q_BQHD: torch.Tensor,
    k_BKHD: torch.Tensor,
    v_BKHD: torch.Tensor,
    key_lengths_B: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    build = _build()
    if build == "flash_attn":
        from flash_attn import flash_attn_func

        out: torch.Tensor = flash_attn_func(q_BQHD, k_BKHD, v_BKHD, softmax_scale=scale, causal=causal)
        return out
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    batch, queries, heads, size = q_BQHD.shape
    keys = k_BKHD.shape[1]
    if key_lengths_B is None:
        k, v = k_BKHD.flatten(0, 1), v_BKHD.flatten(0, 1)
        starts_k: torch.Tensor | None = _row_starts(batch, keys, k.device)
    else:
        k, v, starts_k = k_BKHD, v_BKHD, None
    out = flash_attn_varlen_func(
        q_BQHD.flatten(0, 1),
        k,
        v,
        max_seqlen_q=queries,
        cu_seqlens_q=_row_starts(batch, queries, q_BQHD.device),
        max_seqlen_k=keys,
        cu_seqlens_k=starts_k,
        seqused_k=key_lengths_B,
        softmax_scale=scale,
        causal=causal,
        fa_version=3 if build == "vllm_fa3" else 2,
    )
    return out.view(batch, queries, heads, size)


def _flash_attention_fake(
    q_BQHD: torch.Tensor,
    k_BKHD: torch.Tensor,
    v_BKHD: torch.Tensor,
    key_lengths_B: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    return q_BQHD.new_empty(q_BQHD.shape)


# One opaque node for torch.compile: the kernels' own operators have no shape functions.
_LIBRARY = torch.library.Library("vllm_omni", "FRAGMENT")
direct_register_custom_op(
    "flash_attention",
    _flash_attention,
    fake_impl=_flash_attention_fake,
    target_lib=_LIBRARY,
    dispatch_key="CUDA",
)


class FlashAttnBackend(AttentionBackend):
    """FlashAttention 3 or 2 for half-precision layers on NVIDIA GPUs."""

    name = "FLASH_ATTN"

    def __init__(self, num_heads: int, head_size: int, softmax_scale: float, causal: bool, num_kv_heads: int) -> None:
        super().__init__(num_heads, head_size, softmax_scale, causal, num_kv_heads)
        self._masked = SDPABackend(num_heads, head_size, softmax_scale, causal, num_kv_heads)
        self._takes_lengths = _build() == "vllm_fa3"

    @classmethod
    def why_not(cls, device_type: str, dtype: torch.dtype, head_size: int) -> str | None:
        """NVIDIA GPU, bfloat16 or float16, head size a multiple of 8 up to 256, and a build of the kernels."""
        if device_type != "cuda":
            return f"needs an NVIDIA GPU, the device is {device_type}"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"needs bfloat16 or float16, the dtype is {dtype}"
        if head_size % 8 or head_size > 256:
            return f"needs a head size that is a multiple of 8 and at most 256, it is {head_size}"
        if _build() is None:
            return "neither vLLM's FlashAttention nor the flash-attn package supports this GPU"
        return None

    def forward(
        self, q_BQHD: torch.Tensor, k_BKHD: torch.Tensor, v_BKHD: torch.Tensor, metadata: AttentionMetadata | None
    ) -> torch.Tensor:
        """See ``AttentionBackend.forward``; the module's text says what happens with a mask."""
        lengths_B = None if metadata is None else metadata.key_lengths_B
        masked = metadata is not None and metadata.attn_mask is not None
        if masked and (lengths_B is None or not self._takes_lengths):
            return self._masked.forward(q_BQHD, k_BKHD, v_BKHD, metadata)
        out: torch.Tensor = torch.ops.vllm_omni.flash_attention(
            q_BQHD, k_BKHD, v_BKHD, lengths_B, self.softmax_scale, self.causal
        )
        return out
