"""Pictures of what a denoising run is going to become, for a fraction of what the VAE costs.

Between two steps, flow matching foresees the clean latents (``flow_match.clean_estimate``). A VAE turns latents into
pictures nearly linearly, so ``LatentToColour`` maps each latent and its eight neighbours to 2 x 2 pixels by least
squares. It is learnt where it is used: from the first few previews, which the VAE decodes (a crop of them), and from
every finished picture of a request that asked for previews. Latents drawn at random would not do: they decode to
nothing that looks like a picture, and what is learnt from them does not carry over.
"""

from __future__ import annotations

import torch
from torch.nn import functional

PIXELS = 2
"""Pixels of a preview along each side of a latent."""
LESSONS = 16
"""From so many lessons on, the VAE decodes no more previews."""
CROP = 48
"""Latents along each side of what is decoded for a lesson: bounds its time and memory."""
MEMORY = 64
"""Lessons that count: older ones fade."""
_RIDGE = 1e-3


class LatentToColour:
    """A linear map from latents to small pictures that improves with what it is shown. Takes whatever latents the VAE
    takes; all on the latents' device."""

    def __init__(self) -> None:
        self.lessons = 0
        """Pairs of latents and pictures that it has seen."""
        self._gram: torch.Tensor | None = None
        self._cross: torch.Tensor | None = None
        self._kernel: tuple[torch.Tensor, torch.Tensor] | None = None

    def wants(self, step: int, steps: int, previews: frozenset[int]) -> bool:
        """Whether the preview after ``step`` of ``steps`` should be a lesson too."""
        half_way = min((number for number in previews if 2 * number >= steps), default=max(previews))
        return not self.lessons or (self.lessons < LESSONS and step == half_way)

    @torch.no_grad()
    def learn(self, latents_BCHW: torch.Tensor, images_BCHW: torch.Tensor) -> None:
        """See what the VAE made of ``latents_BCHW``: pictures in [-1, 1], a whole number of pixels a latent."""
        latents, images = latents_BCHW[:1].float(), images_BCHW[:1].float().clamp(-1, 1)
        channels, height, width = latents.shape[1:]
        small = functional.interpolate(images, size=(height * PIXELS, width * PIXELS), mode="area")
        columns = functional.unfold(_framed(latents), 3)[0].T
        columns = torch.cat([columns, columns.new_ones(len(columns), 1)], dim=1)
        wanted = functional.pixel_unshuffle(small, PIXELS)[0].flatten(1).T
        rows = len(columns)
        gram, cross = columns.T @ columns / rows, columns.T @ wanted / rows
        if self._gram is None or self._cross is None:
            self._gram, self._cross = gram, cross
        else:
            weight = 1 / min(self.lessons + 1, MEMORY)
            self._gram, self._cross = torch.lerp(self._gram, gram, weight), torch.lerp(self._cross, cross, weight)
        self.lessons += 1
        ridge = _RIDGE * self._gram.diagonal().mean()
        solved = torch.linalg.solve(self._gram + ridge * torch.eye(len(gram), device=gram.device), self._cross)
        self._kernel = (solved[:-1].T.reshape(-1, channels, 3, 3).contiguous(), solved[-1])

    @torch.no_grad()
    def render(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Small pictures, [B, 3, 2 H, 2 W] in [-1, 1]. ``learn`` has been called."""
        assert self._kernel is not None
        kernel, bias = self._kernel
        colours = functional.conv2d(_framed(latents_BCHW.float()), kernel, bias)
        return functional.pixel_shuffle(colours, PIXELS).clamp(-1, 1)


def _framed(latents_BCHW: torch.Tensor) -> torch.Tensor:
    """With a neighbour on each side for those at the edge."""
    return functional.pad(latents_BCHW, (1, 1, 1, 1), mode="replicate")


def crop(latents_BCHW: torch.Tensor) -> torch.Tensor:
    """The middle of the first picture, ``CROP`` latents a side at most."""
    height, width = latents_BCHW.shape[-2:]
    top, left = max(0, height - CROP) // 2, max(0, width - CROP) // 2
    return latents_BCHW[:1, :, top : top + CROP, left : left + CROP]


def preview_steps(count: int, steps: int) -> frozenset[int]:
    """Numbers of the steps after which ``count`` previews are made, evenly over a run of ``steps``.

    None after the last one: the picture itself follows it. So there are at most ``steps - 1``.
    """
    return frozenset(min(steps - 1, max(1, round(i * steps / (count + 1)))) for i in range(1, count + 1) if steps > 1)
