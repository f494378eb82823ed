"""Unmasking: how many positions are decided at each step.

A schedule knows the numbers beforehand. An adaptive rule reads them off what the model thinks of the positions.
"ancestral" decides each position by itself, with the probability of the reverse process; see
`multidiff.samplers.remasking`.

Shape suffixes: R rows, N columns, M = positions of `where_RN`, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from multidiff.samplers.checks import LARGEST, check_choice, check_number, check_owner, is_whole_number, refuse
from multidiff.samplers.token_sampling import Candidates

STEPS = 16  # where neither the run nor the settings say


@dataclass(frozen=True)
class Unmasking:
    """How many positions are decided at each step.

    Args:
        unmasking: a schedule, "linear", "cosine", "arccos" or "power"; an adaptive rule, "threshold", "factor" or
            "entropy_bound"; or "ancestral".
        exponent: p of "power", at least 1.
        threshold: τ of "threshold", in [0, 1].
        factor: f of "factor".
        entropy_bound: γ of "entropy_bound", in nats.
        num_inference_steps: K where a run does not say; None is 16. Adaptive rules find their own.

    Raises:
        ValueError: a setting that is out of range, that is missing, or that belongs to another unmasking.
    """

    unmasking: str = "cosine"
    exponent: float | None = None
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    num_inference_steps: int | None = None

    def __post_init__(self) -> None:
        check_choice("unmasking", self.unmasking, (*SCHEDULES, *ADAPTIVE, "ancestral"))
        ranges = {
            "exponent": {"least": 1},
            "threshold": {"most": 1},
            "factor": {"least": 0},
            "entropy_bound": {"least": 0},
        }
        for name, bounds in ranges.items():
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, **bounds)
            check_owner(name, value, "unmasking", self.unmasking, ("power",) if name == "exponent" else (name,))
        if self.num_inference_steps is not None:
            check_steps(self.num_inference_steps)
            if self.is_adaptive:
                refuse(("unmasking", self.unmasking), ("num_inference_steps", self.num_inference_steps))

    @property
    def is_adaptive(self) -> bool:
        """Whether the rule finds its own number of steps."""
        return self.unmasking in ADAPTIVE

    @property
    def is_scheduled(self) -> bool:
        """Whether the number of positions of each step is known at the start of a run."""
        return self.unmasking in SCHEDULES

    def plan(self, sizes: Sequence[int], steps: int) -> list[int]:
        """How many positions of a row a schedule decides at each step, block after block.

        Every block takes one step. The others are divided in proportion to what is left of the blocks.

        Args:
            sizes: number of positions of each block.
            steps: K, from the number of blocks to the number of positions.
        """
        schedule = SCHEDULES[self.unmasking]
        more = {"exponent": self.exponent} if self.unmasking == "power" else {}
        room = [total - block - 1 for block, total in enumerate(accumulate(sizes))]
        until = [0, *((steps - len(sizes)) * left // max(1, room[-1]) + block + 1 for block, left in enumerate(room))]
        return [
            number
            for size, (first, last) in zip(sizes, pairwise(until), strict=True)
            for number in schedule(size, last - first, **more)
        ]

    def adaptive_count(self, candidates: Candidates, score_RN: Tensor, where: Tensor) -> Tensor:
        """count_R, int64: how many positions of each row an adaptive rule decides, from the highest score.

        Args:
            candidates: of the positions of `where`.
            score_RN: the order's scores; -inf where a position is no candidate.
            where: bool [R, N].
        """
        by_entropy = self.unmasking == "entropy_bound"
        none, value_M = (torch.inf, candidates.entropy_M) if by_entropy else (-1.0, candidates.log_probs_M.exp())
        value_RN = torch.full_like(score_RN, none).masked_scatter(where, value_M)
        value_RN = value_RN.masked_fill(score_RN.isneginf(), none)
        sorted_RN = value_RN.gather(1, score_RN.argsort(dim=1, descending=True, stable=True))
        return ADAPTIVE[self.unmasking](sorted_RN, getattr(self, self.unmasking))


def check_steps(steps: Any) -> None:
    """Raises a `ValueError` unless `steps` is a number of steps."""
    if not is_whole_number(steps) or steps < 1:
        raise ValueError(f"num_inference_steps {steps!r} must be a whole number from 1 to {LARGEST:,}")


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
    """How many are decided at each step, where max(1, min(undecided - 1, ⌊n · share(r)⌋)) stay undecided, and none
    after the last step.

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
        probs_RN: probability of each candidate, the highest first; -1 where there is none.
        least: τ.

    Returns:
        count_R: how many, from the first.
    """
    return _at_least_one((probs_RN >= least).sum(1), probs_RN[:, 0] >= 0)


def factor(probs_RN: Tensor, most: float) -> Tensor:
    """The largest n with (n + 1)(1 - p of the n-th) < f, at least one (Fast-dLLM, section 3.3).

    Args:
        probs_RN: probability of each candidate, the highest first; -1 where there is none.
        most: f.
    """
    number_N = torch.arange(2, probs_RN.shape[1] + 2, device=probs_RN.device)
    fits_RN = (number_N * (1 - probs_RN) < most) & (probs_RN >= 0)
    return _at_least_one((fits_RN * (number_N - 1)).amax(1), probs_RN[:, 0] >= 0)


def entropy_bound(entropy_RN: Tensor, gamma: float) -> Tensor:
    """The largest prefix with Σ H - max H ≤ γ nats, at least one (Ben-Hamu et al. 2025, arXiv 2505.24857, eq. 9).

    Args:
        entropy_RN: entropy of each candidate, the lowest first; +inf where there is none.
        gamma: γ.
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
