"""One level's codebook in training; the encodec package's own buffers hold all of it.

The package's training update collapses, because each level's straight-through gradient runs into the next one's
residual. This one takes residuals without gradient:

- a codebook starts as k-means centres;
- each code follows the moving average of what chose it (van den Oord et al. 2017, appendix A.1);
- a code that falls out of use moves to a residual that is badly served (drawn in proportion to squared distance).

Shape suffixes: N residuals, V codes, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from encodec.quantization import ResidualVectorQuantizer
from torch import Tensor


@dataclass(frozen=True)
class Codebook:
    """A view of one level; what changes, changes in the package's buffers.

    Attributes:
        embed_VD: the codes.
        count_V: moving average of how many residuals of a batch choose each.
        sum_VD: moving average of the sum of these residuals.
        started_1: 1 when the codes have been set, else 0.
    """

    embed_VD: Tensor
    count_V: Tensor
    sum_VD: Tensor
    started_1: Tensor

    @property
    def size(self) -> int:
        """Number of codes."""
        return len(self.embed_VD)

    def nearest(self, residual_ND: Tensor) -> Tensor:
        """The code next to each residual, [N, D]; the same choice as the package's."""
        with torch.no_grad():
            return self.embed_VD[torch.cdist(residual_ND, self.embed_VD).argmin(1)]

    @torch.no_grad()
    def start(self, residual_ND: Tensor, generator: torch.Generator) -> None:
        """k-means: 10 rounds from random residuals."""
        self.embed_VD.copy_(residual_ND[_draw(torch.ones(len(residual_ND)), self.size, generator)])
        for _ in range(10):
            count_V, sum_VD, distance_N = self._assign(residual_ND)
            self.embed_VD.copy_(sum_VD / count_V.clamp_min(1)[:, None])
            empty_V = count_V == 0
            self.embed_VD[empty_V] = residual_ND[_draw(distance_N.square(), int(empty_V.sum()), generator)]
        self.count_V.fill_(1.0)
        self.sum_VD.copy_(self.embed_VD)
        self.started_1.fill_(1.0)

    @torch.no_grad()
    def follow(self, residual_ND: Tensor, decay: float, revive_below: float, generator: torch.Generator) -> None:
        """One step of the moving averages; a code with less than `revive_below` of the average use moves elsewhere."""
        count_V, sum_VD, distance_N = self._assign(residual_ND)
        self.count_V.lerp_(count_V, 1 - decay)
        self.sum_VD.lerp_(sum_VD, 1 - decay)
        self.embed_VD.copy_(self.sum_VD / self.count_V.clamp_min(1e-5)[:, None])
        average = len(residual_ND) / self.size
        dead_V = self.count_V < revive_below * average
        if dead_V.any():
            self.embed_VD[dead_V] = residual_ND[_draw(distance_N.square(), int(dead_V.sum()), generator)]
            self.count_V[dead_V] = average
            self.sum_VD[dead_V] = self.embed_VD[dead_V] * average

    def usage(self) -> tuple[Tensor, Tensor]:
        """Share of codes in use (from a tenth of the average: a moving average never reaches 0), and perplexity."""
        share_V = self.count_V / self.count_V.sum().clamp_min(1e-9)
        return (share_V > 0.1 / self.size).float().mean(), torch.special.entr(share_V).sum().exp()

    def _assign(self, residual_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many residuals choose each code, their sum, and how far each is from its code."""
        distance_N, ids_N = torch.cdist(residual_ND, self.embed_VD).min(1)
        count_V = torch.bincount(ids_N, minlength=self.size).float()
        return count_V, torch.zeros_like(self.embed_VD).index_add_(0, ids_N, residual_ND), distance_N


def codebooks_of(quantizer: ResidualVectorQuantizer) -> list[Codebook]:
    """The package's codebooks, first level first."""
    books = [layer.get_submodule("_codebook") for layer in quantizer.vq.layers]
    names = ("embed", "cluster_size", "embed_avg", "inited")
    return [Codebook(*(book.get_buffer(name) for name in names)) for book in books]


def _draw(weight_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices in proportion to weight, with replacement; drawn on the CPU, alike on every kind of device."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    return torch.multinomial(weight_N.cpu() + 1e-12, count, replacement=True, generator=generator)
