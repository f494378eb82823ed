"""Masks and uniform tokens mixed (von Rütte et al. 2025, GIDD, arXiv 2503.04482, section 4)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from multidiff.processes.interpolating import Interpolating, Shares
from multidiff.processes.schedules import LogLinear, Schedule


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

    schedule: Schedule = field(default_factory=LogLinear)
    uniform_share: float = 0.1

    def __post_init__(self) -> None:
        self.schedule.check()
        if not isinstance(self.uniform_share, int | float) or not 0 < self.uniform_share < 1:
            raise ValueError(
                f"uniform_share {self.uniform_share!r} of the hybrid process must be between 0 and 1. Without uniform "
                "tokens, choose Absorbing; without masks, Uniform."
            )

    @property
    def starts_masked(self) -> bool:
        return True

    def shares(self, t: Tensor) -> Shares:
        clean = self.schedule.alpha(t)
        mixed = self._mixed(clean)
        return Shares(clean / (1 + mixed), mixed / (1 + mixed), (1 - clean) / (1 + mixed))

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """w_mask = n' / (n (1 + c)), and w_code is half of it."""
        weight = self.schedule.weight(t) / (1 + self._mixed(self.schedule.alpha(t)))
        return weight, weight / 2

    def _mixed(self, clean: Tensor) -> Tensor:
        scale = 2 * self.uniform_share / (1 - self.uniform_share)
        return scale * (clean * (1 - clean)).clamp_min(torch.finfo(clean.dtype).tiny).sqrt()
