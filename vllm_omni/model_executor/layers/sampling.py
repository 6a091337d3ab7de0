"""vLLM's way to choose the next token, on tensors that keep their places, so that a CUDA graph can hold it.

vLLM's own ``Sampler`` builds its tensors anew on the host in every step: the tokens so far as padded lists, then a
dozen launches for penalties alone. Here what a request asks for and what it has said stand on the device, in a slot
that is its own; a row of the batch names its slot. A step is tensor operations only: minimum of tokens, repetition
penalty, temperature, top-k, top-p, a draw with exponential noise. Order and arithmetic are those of
``vllm.v1.sample.sampler.Sampler``, by vLLM's own functions where they keep shapes static, or on a GPU in two kernels
(``sampling_kernels``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from vllm._custom_ops import apply_repetition_penalties
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

from vllm_omni.logger import init_logger

logger = init_logger(__name__)

GREEDY_BELOW = 1e-5
"""vLLM takes the likeliest token at temperatures below this."""


class Rules(NamedTuple):
    """What one request asks of its sampling."""

    slot: int
    """Place of the request's tokens."""
    temperature: float
    top_k: int
    """1 .. vocabulary."""
    top_p: float
    repetition_penalty: float


class TokenSampler:
    """Samples for up to ``rows`` requests of a batch.

    ``arrange`` says which request is in which row. All tensors that ``sample`` and ``keep`` read and write have fixed
    places: a graph of n rows works on the first n. Rows without a request work on a slot that nobody reads, so a batch
    may be padded.
    """

    def __init__(self, rows: int, vocabulary: int, length: int, *, able: bool = True) -> None:
        """Tensors are made on torch's default device.

        Args:
            rows: largest batch, and number of slots.
            vocabulary: number of token ids.
            length: most tokens that a request may sample.
            able: whether ``sample`` may be called; otherwise vLLM samples, and this only knows who is greedy.
        """
        self.rows, self.vocabulary, self.able = rows, vocabulary, able
        self.own = False
        """Whether the tokens of this step are sampled here."""
        self.drawing = False
        """Whether a row of the batch is not greedy."""
        self._nobody = np.array([rows, 0.0, vocabulary, 1.0, 1.0], dtype=np.float32)
        self._rules = torch.tensor(np.tile(self._nobody, (rows, 1)).tolist(), dtype=torch.float32)
        self._seen = torch.zeros(rows + 1, vocabulary, dtype=torch.bool)
        self._stops = torch.zeros(rows + 1, vocabulary, dtype=torch.bool)
        self._made = torch.zeros(rows + 1, dtype=torch.int64)
        self._least = torch.zeros(rows + 1, dtype=torch.int64)
        self._log = torch.zeros(rows + 1, length, dtype=torch.int32)
        self._one = torch.ones(rows, dtype=torch.int64)
        self.kernels = False
        """Whether the work is done by ``sampling_kernels``."""

    def use_kernels(self) -> None:
        """Work by ``sampling_kernels`` from now on, if they work on this machine."""
        from vllm_omni.model_executor.layers import sampling_kernels  # Triton: only where there is a GPU

        wrong = sampling_kernels.check(self.vocabulary, self._rules.device)
        if wrong is not None:
            logger.warning("tokens are sampled by PyTorch's operations: %s", wrong)
        self.kernels = wrong is None

    # -- on the host, when requests come and go --

    def open(self, slot: int, tokens: np.ndarray, made: int, least: int, stops: Collection[int]) -> None:
        """Begin with ``tokens`` (prompt, then ``made`` sampled ones); ``stops`` are barred before token ``least``."""
        seen, barred = np.zeros((2, self.vocabulary), dtype=bool)
        seen[tokens[(tokens >= 0) & (tokens < self.vocabulary)]] = True
        barred[[stop for stop in stops if 0 <= stop < self.vocabulary]] = True
        self._upload(self._seen[slot], seen)
        if least > made:
            self._upload(self._stops[slot], barred)
        self._made[slot].fill_(made)
        self._least[slot].fill_(least)
        if made:
            self._upload(self._log[slot, :made], tokens[-made:].astype(np.int32))

    def arrange(self, rules: Sequence[Rules | None]) -> None:
        """Say whose row is whose; None is a row whose token is thrown away."""
        values = np.tile(self._nobody, (self.rows, 1))
        for row, rule in enumerate(rules):
            if rule is not None:
                values[row] = rule
        self.drawing = bool((values[:, 1] >= GREEDY_BELOW).any())
        self._upload(self._rules, values)

    def made(self, slot: int, count: int) -> list[int]:
        """The first ``count`` tokens that ``slot`` sampled. Waits for the device."""
        tokens: list[int] = self._log[slot, :count].tolist()
        return tokens

    def agrees(self, other: TokenSampler) -> bool:
        """Whether the slots have said the same. Waits for the device."""
        mine, others = ((x._seen[:-1], x._made[:-1], x._log[:-1]) for x in (self, other))
        return all(map(torch.equal, mine, others))

    def _upload(self, target: torch.Tensor, values: np.ndarray) -> None:
        source = torch.from_numpy(np.ascontiguousarray(values))
        # A pinned copy of its own: the next one must not change what is still being read.
        target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)

    # -- on the device; may stand in a graph --

    def greedy(self, batch: int) -> torch.Tensor:
        """Rows [batch] bool that take the likeliest token."""
        return self._rules[:batch, 1] < GREEDY_BELOW

    def sample(self, logits_BV: torch.Tensor, noise_BV: torch.Tensor) -> torch.Tensor:
        """Next tokens [B] int64 of the first B rows; ``noise`` are exponential draws, unused in greedy rows."""
        batch = logits_BV.shape[0]
        if self.kernels:
            from vllm_omni.model_executor.layers import sampling_kernels

            state = self._rules, self._seen, self._stops, self._made, self._least
            return sampling_kernels.sample(logits_BV, noise_BV, *state, GREEDY_BELOW)
        slots, (temperature, top_k, top_p, penalty) = self._slots(batch), self._rules[:batch, 1:].unbind(1)
        early = (self._made[slots] < self._least[slots])[:, None]
        logits = logits_BV.to(torch.float32).masked_fill(early & self._stops[slots], float("-inf"))
        seen = self._seen[slots]
        apply_repetition_penalties(logits, seen, seen, penalty.contiguous())
        best, greedy = logits.argmax(-1), temperature < GREEDY_BELOW
        logits = logits / temperature.masked_fill(greedy, 1.0)[:, None]
        logits = apply_top_k_top_p_pytorch(logits, top_k.long(), top_p)
        drawn = (logits.softmax(-1) / noise_BV).argmax(-1)
        return torch.where(greedy, best, drawn)

    def keep(self, tokens_B: torch.Tensor) -> None:
        """Note what the first B rows said, whoever sampled it."""
        if self.kernels:
            from vllm_omni.model_executor.layers import sampling_kernels

            sampling_kernels.keep(tokens_B, self._rules, self._seen, self._log, self._made)
            return
        batch = tokens_B.shape[0]
        slots = self._slots(batch)
        self._seen.view(-1).index_fill_(0, slots * self.vocabulary + tokens_B, True)
        length = self._log.shape[1]
        at = slots * length + self._made[slots].clamp(max=length - 1)
        self._log.view(-1).index_copy_(0, at, tokens_B.int())
        self._made.index_add_(0, slots, self._one[:batch])

    def _slots(self, batch: int) -> torch.Tensor:
        return self._rules[:batch, 0].long()


_SAMPLE = -1
"""In place of a given token: sample it."""


class TokenChoice:
    """The next token of every row of a batch, sampled by a ``TokenSampler`` or given: ``prepare`` on the host, then
    ``choose`` on the device, which may stand in a graph."""

    def __init__(
        self,
        tokens: TokenSampler,
        logits: Callable[[torch.Tensor], torch.Tensor],
        width: int,
        dtype: torch.dtype,
        draws: int = 0,
    ) -> None:
        """Tensors are made on torch's default device.

        Args:
            tokens: samples; where it is not able to, tokens are always given.
            logits: hidden states [B, width] to logits [B, vocabulary].
            width: of hidden states.
            dtype: of hidden states.
            draws: exponential draws that the caller needs for each row besides, also where the token is given.
        """
        self._tokens, self._logits = tokens, logits
        self.hidden = torch.zeros(tokens.rows, width, dtype=dtype)
        """Hidden states of the last ``prepare``, in their fixed place."""
        noise = torch.ones(tokens.rows, tokens.vocabulary + draws, dtype=torch.float32)  # one draw for all of a step
        self._noise, self._own = noise, noise[:, : tokens.vocabulary]
        self.draws = noise[:, tokens.vocabulary :]
        """The caller's draws [rows, draws]; made anew by ``prepare`` where a row of the batch is not greedy."""
        self._given = torch.full((tokens.rows,), _SAMPLE, dtype=torch.int64)
        self._sampling = True

    def prepare(self, hidden_BC: torch.Tensor, given_B: torch.Tensor | None) -> None:
        """Put in place what ``choose`` needs. ``given_B``: the tokens; None: sample as ``tokens`` was told to."""
        batch = len(hidden_BC)
        self.hidden[:batch].copy_(hidden_BC)
        if given_B is not None:
            self._given[:batch].copy_(given_B)
        elif not self._sampling:
            self._given.fill_(_SAMPLE)
        self._sampling = given_B is None
        if self._tokens.drawing and (given_B is None or self.draws.shape[1]):
            self._noise[:batch].exponential_()

    def choose(self, batch: int) -> torch.Tensor:
        """Tokens [batch] int64 of the first ``batch`` rows; ``tokens`` keeps them."""
        given = self._given[:batch]
        if not self._tokens.able:
            return given
        drawn = self._tokens.sample(self._logits(self.hidden[:batch]), self._own[:batch])
        chosen = torch.where(given == _SAMPLE, drawn, given)
        self._tokens.keep(chosen)
        return chosen
