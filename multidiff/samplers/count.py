"""Count: how many positions of a row stay undecided after step k = 0, 1, … of K.

K is the row's own: a row with fewer positions than the run has steps takes one step for each.

Shape suffix: R rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def linear(step: int, steps_R: Tensor, initial_R: Tensor, undecided_R: Tensor) -> Tensor:
    """⌊n₀ / K⌋ positions a step, the first n₀ mod K steps one more (Nie et al. 2025, LLaDA)."""
    decided_R = initial_R // steps_R * (step + 1) + (initial_R % steps_R).clamp_max(step + 1)
    return torch.minimum(undecided_R, initial_R - decided_R)


def cosine(step: int, steps_R: Tensor, initial_R: Tensor, undecided_R: Tensor) -> Tensor:
    """max(1, min(undecided - 1, ⌊n₀ cos(π/2 · (k + 1)/K)⌋)); 0 after the last (Chang et al. 2022, MaskGIT).

    n₀ is what was unknown at the start, not the size of the grid, so that inpainting takes all its steps.
    """
    share_R = torch.cos(torch.pi / 2 * (step + 1) / steps_R.double())
    kept_R = torch.minimum((initial_R * share_R).floor().long(), undecided_R - 1).clamp_min(1)
    return torch.where(step + 1 < steps_R, kept_R, 0)


COUNTS: dict[str, Callable[[int, Tensor, Tensor, Tensor], Tensor]] = {"linear": linear, "cosine": cosine}
