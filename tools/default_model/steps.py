"""Training steps that can be recorded as CUDA graphs: launching their many small kernels costs more than the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tools.default_model.optimiser import Average, Muon


class Optimiser:
    """Muon for matrices and AdamW for the rest behind one learning rate on the device, with averaged weights."""

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        muon_lr: float,
        adam_lr: float,
        average: float,
    ) -> None:
        self.parameters = matrices + others
        device = others[0].device
        self._adam_lr = adam_lr
        self._muon = Muon(matrices, muon_lr)
        self._scale = torch.zeros((), device=device)
        self._lr = torch.zeros((), device=device)
        self._adam = torch.optim.AdamW(
            others, lr=self._lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=others[0].is_cuda
        )
        self.average = Average(self.parameters, average)

    def rate(self, scale: float) -> None:
        """Set the learning rates to scale times their largest values."""
        self._scale.fill_(scale)
        self._lr.fill_(scale * self._adam_lr)

    def forget_gradients(self) -> None:
        """Drop all gradients, so that the next backward pass writes new ones."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        """Apply the gradients, clipped to a norm of 1."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self._adam.step()
        self._muon.step(self._scale)
        self.average.update()

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the moments in place; the parameters stay as they are, and their average becomes them."""
        self._muon.restart()
        for state in self._adam.state.values():
            for tensor in state.values():
                tensor.zero_()
        torch._foreach_copy_(self.average.values, [p.detach() for p in self.parameters])


class Stepper:
    """One training step of several kinds: the loss of a kind, backward, and the optimiser."""

    def __init__(self, losses: Iterable[Callable[[], Tensor]], optimiser: Optimiser) -> None:
        self.optimiser = optimiser
        self._losses = list(losses)
        self.total = torch.zeros((), device=optimiser.parameters[0].device)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._stream = torch.cuda.Stream() if self.total.is_cuda else None

    def _body(self, kind: int) -> None:
        loss = self._losses[kind]()
        loss.backward()
        self.optimiser.step()
        self.total += loss.detach()

    def warm(self, rounds: int = 2) -> None:
        """Run every kind without learning, which compiles what is compiled, and forget what the optimiser saw."""
        for kind in range(len(self._losses)):
            for _ in range(rounds):
                self.step(kind, 0.0)
        self.optimiser.restart()
        self.total.zero_()

    def record(self) -> None:
        """Record all kinds; they must have been run before.

        Raises:
            RuntimeError: if a step does what cannot be recorded. The process should then start anew without this.
        """
        torch.cuda.synchronize()
        graphs = []
        for kind in range(len(self._losses)):
            self.optimiser.forget_gradients()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._body(kind)
            graphs.append(graph)
        torch.cuda.synchronize()
        self._graphs = graphs

    def step(self, kind: int, scale: float) -> None:
        """Train once with the learning rates times scale."""
        if self._stream is None:
            self._step(kind, scale)
            return
        # everything on one stream: a recorded backward pass may not wait for another one
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step(kind, scale)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _step(self, kind: int, scale: float) -> None:
        self.optimiser.rate(scale)
        if self._graphs:
            self._graphs[kind].replay()
            return
        self.optimiser.forget_gradients()
        self._body(kind)
