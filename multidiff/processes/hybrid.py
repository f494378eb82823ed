"""Masks and uniform tokens mixed (von Rütte et al. 2025, GIDD, arXiv 2503.04482, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multidiff.processes.interpolating import Interpolating, Shares


@dataclass(frozen=True)
class Hybrid(Interpolating):
    """Tokens become `<mask>`, and on the way there some become another token of their span.

    With n = 1 - α(t) of the schedule, a token is clean, uniform and `<mask>` in proportion to

        1 - n,    c = B √(n (1 - n)),    n,        B = 2 p / (1 - p),

    so that the share of uniform tokens is p where n = 1/2 and vanishes at both ends. The model learns to doubt tokens
    that it sees, and can correct its own. It starts from masks, so samplers that unmask fit it too.

    Attributes:
        schedule: α.
        uniform_share: p, in (0, 1).

    Raises:
        ValueError: a share outside of (0, 1).
    """

    uniform_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.uniform_share, int | float) or not 0 < self.uniform_share < 1:
            raise ValueError(
                f"uniform_share {self.uniform_share!r} of the hybrid process must be between 0 and 1. Without uniform "
                "tokens, choose Absorbing; without masks, Uniform."
            )

    @property
    def starts_masked(self) -> bool:
        return True

    def shares(self, t: Tensor) -> Shares:
        mixed = self._mixed(t)
        return Shares(self.schedule.alpha(t) / (1 + mixed), mixed / (1 + mixed), self.schedule.noise(t) / (1 + mixed))

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """w_mask = n' / (n (1 + c)), and w_code is half of it."""
        weight = self.schedule.weight(t) / (1 + self._mixed(t))
        return weight, weight / 2

    def _mixed(self, t: Tensor) -> Tensor:
        """c."""
        both = self.schedule.noise(t) * self.schedule.alpha(t)
        return 2 * self.uniform_share / (1 - self.uniform_share) * both.clamp_min(torch.finfo(both.dtype).tiny).sqrt()
