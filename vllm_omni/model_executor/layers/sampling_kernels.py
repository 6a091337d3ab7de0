"""Triton kernels of ``sampling.TokenSampler``: one for a row's next token, one that notes it.

In PyTorch a step of sampling is some fifty launches, among them a sort of the vocabulary. Here a program has a row's
logits in registers and finds the limits of top-k and top-p by searches over their bits, as ``dense_kernels`` does for
the residual codes. Tokens that tie at a limit, which are those that agree in 19 bits of their mantissa, are all kept,
where a sort keeps some of them. Imported only where there is a GPU.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from vllm_omni.model_executor.layers.dense_kernels import CHOOSE_WAYS, _likeliest, _nucleus
from vllm_omni.model_executor.layers.overlap import announce, follow, overlap
from vllm_omni.model_executor.layers.sampling import Rules, TokenSampler

MOST_TOKENS = 16384
"""Largest vocabulary, padded to a power of two, that a program holds."""
STEPS = 28
"""Bits of a logit that are searched."""
RULES = 5
"""Numbers of a row's rules: slot, temperature, top-k, top-p, repetition penalty."""


@triton.jit
def _sample(
    logits_ptr,
    noise_ptr,
    rules_ptr,
    seen_ptr,
    stops_ptr,
    made_ptr,
    least_ptr,
    token_ptr,
    noise_step,
    greedy_below,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    RULES: tl.constexpr,
    STEPS: tl.constexpr,
    ROUNDS: tl.constexpr,
    WAYS: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    """The next token of one row."""
    announce(launch_pdl)
    row = tl.program_id(0)
    v = tl.arange(0, BLOCK)
    inside = v < V
    follow(launch_pdl)
    rules = rules_ptr + row * RULES
    slot = tl.load(rules).to(tl.int64)
    temperature, top_k = tl.load(rules + 1), tl.load(rules + 2).to(tl.int32)
    top_p, penalty = tl.load(rules + 3), tl.load(rules + 4)
    logits = tl.load(logits_ptr + row * V + v, mask=inside, other=float("-inf")).to(tl.float32)
    seen = tl.load(seen_ptr + slot * V + v, mask=inside, other=0) != 0
    stops = tl.load(stops_ptr + slot * V + v, mask=inside, other=0) != 0
    early = tl.load(made_ptr + slot) < tl.load(least_ptr + slot)
    logits = tl.where(early & stops, float("-inf"), logits)
    logits = tl.where(seen, tl.where(logits > 0, logits / penalty, logits * penalty), logits)
    if temperature < greedy_below:
        token = tl.argmax(logits, axis=0)
    else:
        logits = logits / temperature
        bits = logits.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - STEPS)  # ordered as the logits are; steps beyond them fit
        probs = tl.exp(logits - tl.max(logits, axis=0))
        top = tl.max(key, axis=0)
        low = _likeliest(key, tl.min(key, axis=0), top + 1, top_k, ROUNDS, WAYS)
        limit = top_p * tl.sum(tl.where(key >= low, probs, 0.0), axis=0)
        high = _nucleus(key, probs, low - 1, top, limit, ROUNDS, WAYS)
        noise = tl.load(noise_ptr + row * noise_step + v, mask=inside, other=1.0)
        token = tl.argmax(tl.where((key >= high) & (probs > 0), probs / noise, -1.0), axis=0)
    tl.store(token_ptr + row, token.to(tl.int64))


@triton.jit
def _keep(
    token_ptr,
    rules_ptr,
    seen_ptr,
    log_ptr,
    made_ptr,
    V: tl.constexpr,
    LENGTH: tl.constexpr,
    RULES: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    """Note what one row said. Rows of nobody share a slot that nobody reads."""
    announce(launch_pdl)
    row = tl.program_id(0)
    follow(launch_pdl)
    slot = tl.load(rules_ptr + row * RULES).to(tl.int64)
    token, made = tl.load(token_ptr + row), tl.load(made_ptr + slot)
    tl.store(seen_ptr + slot * V + token, 1)
    tl.store(log_ptr + slot * LENGTH + tl.minimum(made, LENGTH - 1), token.to(tl.int32))
    tl.store(made_ptr + slot, made + 1)


def sample(
    logits: torch.Tensor,
    noise: torch.Tensor,
    rules: torch.Tensor,
    seen: torch.Tensor,
    stops: torch.Tensor,
    made: torch.Tensor,
    least: torch.Tensor,
    greedy_below: float,
) -> torch.Tensor:
    """Next tokens [B] int64 of logits [B, V]; the other tensors are those of ``TokenSampler``."""
    batch, size = logits.shape
    tokens = torch.empty(batch, device=logits.device, dtype=torch.int64)
    block = triton.next_power_of_2(size)
    # Of a large vocabulary four ways at once would not fit into registers.
    ways = CHOOSE_WAYS if block <= 4096 else 2
    _sample[(batch,)](
        logits,
        noise,
        rules,
        seen.view(torch.uint8),
        stops.view(torch.uint8),
        made,
        least,
        tokens,
        noise.stride(0),
        greedy_below,
        V=size,
        BLOCK=block,
        RULES=RULES,
        STEPS=STEPS,
        ROUNDS=STEPS // (ways.bit_length() - 1) + 1,
        WAYS=ways,
        launch_pdl=overlap(logits.device),
        num_warps=8 if block <= 4096 else 16,
    )
    return tokens


def keep(tokens: torch.Tensor, rules: torch.Tensor, seen: torch.Tensor, log: torch.Tensor, made: torch.Tensor) -> None:
    """Note ``tokens`` [B] in the tensors of ``TokenSampler``."""
    _keep[(len(tokens),)](
        tokens,
        rules,
        seen.view(torch.uint8),
        log,
        made,
        V=seen.shape[1],
        LENGTH=log.shape[1],
        RULES=RULES,
        launch_pdl=overlap(tokens.device),
        num_warps=1,
    )


def check(vocabulary: int, device: torch.device, rows: int = 32) -> str | None:
    """Sample and note two tokens of some rows; what is wrong with the kernels on this machine, or None."""
    if triton.next_power_of_2(vocabulary) > MOST_TOKENS:
        return f"{vocabulary} tokens"
    random = np.random.default_rng(0)
    with device:
        plain, fused = TokenSampler(rows, vocabulary, 4), TokenSampler(rows, vocabulary, 4)
    fused.kernels = True
    rules = [
        Rules(rows - 1 - row, (0.0, 0.7, 1.3)[row % 3], (vocabulary, 1, 9)[row % 4 % 3], (1.0, 0.8)[row % 2], 1.3)
        for row in range(rows - 1)
    ]
    for tokens in (plain, fused):
        for slot in range(rows):
            tokens.open(slot, random.integers(0, vocabulary, 5).astype(np.int32), 0, slot % 2, [slot % vocabulary])
        tokens.arrange([*rules, None])
        random = np.random.default_rng(0)
    try:
        for _ in range(2):
            logits = 3 * torch.randn(rows, vocabulary, device=device)
            noise = torch.empty(rows, 2 * vocabulary, device=device).exponential_()[:, :vocabulary]
            want, got = plain.sample(logits, noise), fused.sample(logits, noise)
            # Two tokens that are all but equal may change places.
            if int((want != got).sum()) > 1 or not torch.equal(want[::3], got[::3]):
                return "other tokens are sampled"
            for tokens in (plain, fused):
                tokens.keep(want)
        if not fused.agrees(plain):
            return "tokens are not noted as they should be"
    except (TritonError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None
