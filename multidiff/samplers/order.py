"""Order: a score for each undecided position; the highest are decided first, ties by position.

Some orders follow what the model thinks of the positions, others where they stand: coordinates, and how far those of
the segment extend on each axis.

Shape suffixes: M positions, N columns of one row, 3 axes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from multidiff.samplers.token_sampling import Candidates


def random(candidates: Candidates, uniform_M: Tensor) -> Tensor:
    """Any order is as likely as any other. One position a step, it samples the model's any-order distribution."""
    return uniform_M


def confidence(candidates: Candidates, uniform_M: Tensor) -> Tensor:
    """log p of the drawn token (Chang et al. 2022, MaskGIT, arXiv 2202.04200)."""
    return candidates.log_p_M


def margin(candidates: Candidates, uniform_M: Tensor) -> Tensor:
    """p of the most probable token less p of the second (Kim et al. 2025, arXiv 2502.06768)."""
    return candidates.margin_M


def entropy(candidates: Candidates, uniform_M: Tensor) -> Tensor:
    """Minus the entropy, nats."""
    return -candidates.entropy_M


BY_MODEL: dict[str, Callable[[Candidates, Tensor], Tensor]] = {
    "random": random,
    "confidence": confidence,
    "margin": margin,
    "entropy": entropy,
}


def left_to_right(coords_N3: Tensor, extent_N3: Tensor) -> Tensor:
    """As the codes follow each other in time or text."""
    if not bool(coords_N3[:, 0].any()) and bool(coords_N3[:, 2].any()):
        raise ValueError("order 'left_to_right' needs codes in a line, but these stand on a grid: use order 'row_scan'")
    return torch.arange(len(coords_N3))


def row_scan(coords_N3: Tensor, extent_N3: Tensor) -> Tensor:
    """Row by row, each from left to right."""
    _must_be_grid("row_scan", coords_N3)
    return torch.arange(len(coords_N3))


def halton(coords_N3: Tensor, extent_N3: Tensor) -> Tensor:
    """As the points of the Halton sequence of bases 2 and 3 fall on the grid, which spreads each step's cells evenly
    (Besnier et al. 2025, arXiv 2503.17076)."""
    _must_be_grid("halton", coords_N3)
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


@lru_cache(maxsize=64)
def halton_ranks(height: int, width: int) -> np.ndarray:
    """int64 [height, width]: the rank of each cell's first point. Points are drawn until every cell has one."""
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


def _must_be_grid(name: str, coords_N3: Tensor) -> None:
    if bool(coords_N3[:, 0].any()):
        raise ValueError(f"order {name!r} needs codes on a grid, but these stand in a line: use order 'left_to_right'")
