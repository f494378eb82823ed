"""A codebook in training. Each latent of an encoder is rounded to its nearest code.

If codes are learned by gradient, unused codes get no gradient and stay unused. Here

- a codebook is initialized by k-means;
- each code follows the moving average of the latents that choose it (van den Oord et al. 2017, appendix A.1);
- an unused code moves to a random latent, drawn in proportion to the squared distance from its nearest code.

Shape suffixes: N latents, V codes, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codebook:
    """A view of the tensors of a codebook. Updates change these tensors in place.

    Attributes:
        codes_VD: the codes.
        count_V: the moving average of the number of latents per batch that choose each code; all 0 before `start`.
        sum_VD: the moving average of the sum of these latents.
    """

    codes_VD: Tensor
    count_V: Tensor
    sum_VD: Tensor

    def __len__(self) -> int:
        return len(self.codes_VD)

    @property
    def started(self) -> bool:
        """Whether the codes have been initialized."""
        return bool(self.count_V.any())

    def nearest(self, latents_ND: Tensor) -> Tensor:
        """The nearest code of each latent, [N, D]."""
        with torch.no_grad():
            return self.codes_VD[torch.cdist(latents_ND, self.codes_VD).argmin(1)]

    @torch.no_grad()
    def start(self, latents_ND: Tensor, generator: torch.Generator, batches: int = 1) -> None:
        """Initialize the codes by 10 rounds of k-means, starting from random latents.

        Args:
            latents_ND: the latents of one batch or of several.
            generator: draws the random latents.
            batches: the number of batches.
        """
        self.codes_VD.copy_(latents_ND[_draw(torch.ones(len(latents_ND)), len(self), generator)])
        for _ in range(10):
            count_V, sum_VD, distance_N = self._assign(latents_ND)
            self.codes_VD.copy_(sum_VD / count_V.clamp_min(1)[:, None])
            empty_V = count_V == 0
            self.codes_VD[empty_V] = latents_ND[_draw(distance_N.square(), int(empty_V.sum()), generator)]
        self.count_V.fill_(len(latents_ND) / batches / len(self))
        self.sum_VD.copy_(self.codes_VD * self.count_V[:, None])

    @torch.no_grad()
    def follow(self, latents_ND: Tensor, decay: float, revive_below: float, generator: torch.Generator) -> None:
        """Update the moving averages, and move each code that is used less than `revive_below` times the average."""
        count_V, sum_VD, distance_N = self._assign(latents_ND)
        self.count_V.lerp_(count_V, 1 - decay)
        self.sum_VD.lerp_(sum_VD, 1 - decay)
        self.codes_VD.copy_(self.sum_VD / self.count_V.clamp_min(1e-5)[:, None])
        average = len(latents_ND) / len(self)
        dead_V = self.count_V < revive_below * average
        if dead_V.any():
            self.codes_VD[dead_V] = latents_ND[_draw(distance_N.square(), int(dead_V.sum()), generator)]
            self.count_V[dead_V] = average
            self.sum_VD[dead_V] = self.codes_VD[dead_V] * average

    def _assign(self, latents_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The number of latents that choose each code, their sum, and the distance of each latent from its code."""
        distance_N, ids_N = torch.cdist(latents_ND, self.codes_VD).min(1)
        count_V = torch.bincount(ids_N, minlength=len(self)).float()
        return count_V, torch.zeros_like(self.codes_VD).index_add_(0, ids_N, latents_ND), distance_N


def usage(count_V: Tensor, above: float = 0.0) -> tuple[Tensor, Tensor]:
    """The share of codes in use, and the perplexity exp(-Σ_v p_v ln p_v), which is at most V.

    Args:
        count_V: how often each code was chosen.
        above: a code counts as used if its count is more than `above` times the average. Moving averages never reach 0.
    """
    share_V = count_V / count_V.sum().clamp_min(1e-9)
    return (share_V > above / len(share_V)).float().mean(), torch.special.entr(share_V).sum().exp()


def _draw(weight_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices, drawn with replacement in proportion to their weights. The CPU draws them, for all devices."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    return torch.multinomial(weight_N.cpu() + 1e-12, count, replacement=True, generator=generator)
