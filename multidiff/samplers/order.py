"""Order: which undecided positions are decided first.

Each position has a score, and the highest are decided first; of equal scores the first position. Three orders follow
what the model thinks of a position. The others are known before the model is asked: they follow where a position
stands, or chance.

Shape suffixes: R rows, N columns, M = positions of `where_RN`, row by row; 3 axes. Tables of N alone are of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from multidiff.samplers.checks import check_choice, check_number, refuse
from multidiff.samplers.state import draw_uniform
from multidiff.samplers.token_sampling import Candidates, gumbel


@dataclass(frozen=True)
class Order:
    """Which positions are decided next.

    Args:
        order: "random", "confidence", "margin", "entropy", "left_to_right", "row_scan" or "halton".
        order_temperature: τ of the noise τ (1 - (k + 1)/K) · Gumbel on the score at step k of K; 0 is none (Chang et
            al. 2022, MaskGIT, arXiv 2202.04200, section 3.2).
        level_penalty: subtracted from the score for each residual level, so that coarse codes come first; 0 is none.

    Raises:
        ValueError: a setting that is out of range, or noise on a random order.
    """

    order: str = "confidence"
    order_temperature: float = 0.0
    level_penalty: float = 0.0

    def __post_init__(self) -> None:
        check_choice("order", self.order, ORDERS)
        check_number("order_temperature", self.order_temperature, least=0)
        check_number("level_penalty", self.level_penalty, least=0)
        if self.order == "random" and self.order_temperature:
            refuse(("order", self.order), ("order_temperature", self.order_temperature))

    @property
    def is_known_beforehand(self) -> bool:
        """Whether the scores of a run depend neither on the model nor on the step."""
        return self.order not in BY_MODEL and not self.order_temperature

    def fixed_scores(
        self,
        undecided_RN: Tensor,
        levels_RN: Tensor,
        coords_RN3: Tensor,
        extent_RN3: Tensor,
        generator: Sequence[torch.Generator],
    ) -> Tensor:
        """score_RN, float64: the part of the score that is known at the start of a run.

        A random order draws one number for each position. Every permutation of a row is then equally likely, and with
        one position a step the run is the exact ancestral process: given any positions that are decided, the next one
        is equally likely to be any of the others.

        Raises:
            ValueError: positions that stand on a grid where the order needs a line, or the other way round.
        """
        numbers = undecided_RN.sum(1).tolist()
        score_RN = torch.zeros(undecided_RN.shape, dtype=torch.float64, device=undecided_RN.device)
        if self.order == "random":
            score_RN[undecided_RN] = draw_uniform(numbers, 1, generator)[:, 0].to(score_RN.device)
        elif self.order in BY_PLACE:
            for row, number in enumerate(numbers):  # padding follows the positions
                rank_N = BY_PLACE[self.order](coords_RN3[row, :number].cpu(), extent_RN3[row, :number].cpu())
                score_RN[row, :number] = -rank_N.to(score_RN)
        return score_RN - self.level_penalty * levels_RN

    def scores(self, candidates: Candidates, fixed_M: Tensor, uniform_M: Tensor, index: int, steps_M: Tensor) -> Tensor:
        """score_M, float64: the scores at step k of K.

        Args:
            candidates: of the positions.
            fixed_M: `fixed_scores` of the positions.
            uniform_M: a random number for each position, for the noise.
            index: k, from 0.
            steps_M: K of each position's row.
        """
        score_M = fixed_M + BY_MODEL[self.order](candidates) if self.order in BY_MODEL else fixed_M
        if self.order_temperature:
            left_M = (1 - (index + 1) / steps_M.double()).clamp_min(0)
            score_M = score_M + self.order_temperature * left_M * gumbel(uniform_M)
        return score_M


def confidence(candidates: Candidates) -> Tensor:
    """log p of the drawn token (Chang et al. 2022, MaskGIT, arXiv 2202.04200)."""
    return candidates.log_probs_M


def margin(candidates: Candidates) -> Tensor:
    """p of the most probable token minus p of the second (Kim et al. 2025, arXiv 2502.06768)."""
    return candidates.margin_M


def entropy(candidates: Candidates) -> Tensor:
    """Minus the entropy, in nats."""
    return -candidates.entropy_M


BY_MODEL: dict[str, Callable[[Candidates], Tensor]] = {"confidence": confidence, "margin": margin, "entropy": entropy}


def left_to_right(coords_N3: Tensor, extent_N3: Tensor) -> Tensor:
    """Rank of each code of a row that stands in a line: as the codes follow each other in time or text."""
    if not bool(coords_N3[:, 0].any()) and bool(coords_N3[:, 2].any()):
        raise ValueError(
            "order 'left_to_right' needs codes in a line, but these stand on a grid. Use order 'row_scan'."
        )
    return torch.arange(len(coords_N3))


def row_scan(coords_N3: Tensor, extent_N3: Tensor) -> Tensor:
    """Rank of each code of a row that stands on a grid: line by line, each from left to right."""
    _check_grid("row_scan", coords_N3)
    return torch.arange(len(coords_N3))


def halton(coords_N3: Tensor, extent_N3: Tensor) -> Tensor:
    """Rank of each code of a row that stands on a grid: as the points of the Halton sequence of bases 2 and 3 fall on
    it, which spreads the cells of each step evenly (Besnier et al. 2025, arXiv 2503.17076)."""
    _check_grid("halton", coords_N3)
    rank_N = torch.empty(len(coords_N3), dtype=torch.int64)
    for height, width in extent_N3[:, 1:].unique(dim=0).tolist():
        here_N = (extent_N3[:, 1] == height) & (extent_N3[:, 2] == width)
        rank_N[here_N] = torch.from_numpy(halton_ranks(height, width))[coords_N3[here_N, 1], coords_N3[here_N, 2]]
    return rank_N


BY_PLACE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "left_to_right": left_to_right,
    "row_scan": row_scan,
    "halton": halton,
}
ORDERS = ("random", *BY_MODEL, *BY_PLACE)


@lru_cache(maxsize=64)
def halton_ranks(height: int, width: int) -> np.ndarray:
    """int64 [height, width]: rank of the first Halton point in each cell of a grid.

    Points are generated until every cell has one, so every cell has a rank.
    """
    points = 2 * height * width
    while True:
        row = np.floor(_van_der_corput(points, 2) * height).astype(np.int64)
        column = np.floor(_van_der_corput(points, 3) * width).astype(np.int64)
        cells, first = np.unique(row * width + column, return_index=True)
        if len(cells) == height * width:
            ranks = np.empty(height * width, dtype=np.int64)
            ranks[cells[np.argsort(first)]] = np.arange(height * width)
            return ranks.reshape(height, width)
        points *= 2


def _van_der_corput(points: int, base: int) -> np.ndarray:
    """The radical inverse of 1, 2, … (van der Corput 1935)."""
    number, place = np.arange(1, points + 1), 1.0
    value = np.zeros(points)
    while number.any():
        place /= base
        number, digit = np.divmod(number, base)
        value += digit * place
    return value


def _check_grid(name: str, coords_N3: Tensor) -> None:
    if bool(coords_N3[:, 0].any()):
        raise ValueError(f"order {name!r} needs codes on a grid, but these stand in a line. Use order 'left_to_right'.")
