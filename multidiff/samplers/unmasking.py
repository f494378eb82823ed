"""Count: how many positions are decided at each step.

A schedule knows the numbers beforehand; an adaptive rule reads them off what the model thinks of the positions.

Shape suffixes: R rows, N columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def linear(number: int, steps: int) -> list[int]:
    """⌊n / K⌋ positions a step, the first n mod K steps one more (Nie et al. 2025, LLaDA, arXiv 2502.09992)."""
    return [number // steps + (step < number % steps) for step in range(steps)]


def cosine(number: int, steps: int) -> list[int]:
    """Leaves ⌊n cos(π/2 · r)⌋ undecided at r = (k + 1)/K (Chang et al. 2022, MaskGIT, arXiv 2202.04200)."""
    return _leaving(number, steps, lambda r: math.cos(math.pi / 2 * r))


def arccos(number: int, steps: int) -> list[int]:
    """Leaves ⌊n · 2/π · arccos(r)⌋ undecided (Besnier & Chen 2023, arXiv 2310.14400)."""
    return _leaving(number, steps, lambda r: 2 / math.pi * math.acos(r))


def power(number: int, steps: int, exponent: float) -> list[int]:
    """Leaves ⌊n (1 - r^p)⌋ undecided (Chang et al. 2022, section 3.3: square and cubic)."""
    return _leaving(number, steps, lambda r: 1 - r**exponent)


def _leaving(number: int, steps: int, share: Callable[[float], float]) -> list[int]:
    """Numbers decided, where max(1, min(undecided - 1, ⌊n · share(r)⌋)) stay, and none after the last step.

    n is what was unknown at the start, not the size of the grid, so that inpainting takes all its steps.
    """
    decided, undecided = [], number
    for step in range(1, steps + 1):
        kept = max(1, min(undecided - 1, math.floor(number * share(step / steps) + 1e-9))) if step < steps else 0
        decided.append(undecided - kept)
        undecided = kept
    return decided


SCHEDULES: dict[str, Callable[..., list[int]]] = {"linear": linear, "cosine": cosine, "arccos": arccos, "power": power}


def threshold(probs_RN: Tensor, least: float) -> Tensor:
    """Positions of confidence p ≥ τ, at least one (Wu et al. 2025, Fast-dLLM, arXiv 2505.22618, algorithm 1).

    Args:
        probs_RN: probability of each candidate, the surest first; -1 where there is none.

    Returns:
        count_R: how many, from the first.
    """
    return _at_least_one((probs_RN >= least).sum(1), probs_RN[:, 0] >= 0)


def factor(probs_RN: Tensor, most: float) -> Tensor:
    """The largest n with (n + 1)(1 - p of the n-th) < f, at least one (Fast-dLLM, section 3.3)."""
    number_N = torch.arange(2, probs_RN.shape[1] + 2, device=probs_RN.device)
    fits_RN = (number_N * (1 - probs_RN) < most) & (probs_RN >= 0)
    return _at_least_one((fits_RN * (number_N - 1)).amax(1), probs_RN[:, 0] >= 0)


def entropy_bound(entropy_RN: Tensor, gamma: float) -> Tensor:
    """The largest prefix with Σ H - max H ≤ γ nats, at least one (Ben-Hamu et al. 2025, arXiv 2505.24857, eq. 9).

    Args:
        entropy_RN: of each candidate, the lowest first; +inf where there is none.
    """
    there_RN = entropy_RN.isfinite()
    rest_RN = entropy_RN.where(there_RN, 0).cumsum(1) - entropy_RN.where(there_RN, 0)
    return _at_least_one(((rest_RN <= gamma) & there_RN).sum(1), there_RN[:, 0])


def _at_least_one(count_R: Tensor, any_R: Tensor) -> Tensor:
    return torch.maximum(count_R, any_R.to(count_R.dtype))


ADAPTIVE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "threshold": threshold,
    "factor": factor,
    "entropy_bound": entropy_bound,
}
