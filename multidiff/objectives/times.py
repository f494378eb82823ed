"""Times and other uniform numbers of documents, spread evenly over those that are trained together.

Independent times leave gaps by chance, which makes the loss noisy (Kingma et al. 2021, VDM, arXiv 2107.00630,
appendix I.1). Here the numbers of the documents of an epoch are the points of a Kronecker sequence,

    u = frac(offset + position · √n),

in which every run of neighbours is spread evenly (Weyl 1916). The offset is uniform and follows from the seed and the
epoch, so every number is uniform; neighbours of one epoch are not independent. A number depends on the place of its
document in the epoch alone, not on batches or processes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from multidiff.seeding import generator_for

# The golden ratio spreads best; roots of different primes are jointly even.
_BLOCKS = (math.sqrt(23)) % 1  # of the blocks of a segment
_STEPS = ((math.sqrt(5) - 1) / 2, *(math.sqrt(prime) % 1 for prime in (2, 3, 7, 11, 13, 17, 19)))
SMALLEST = 1e-3


def spread_uniform(seed: int, epoch: int, position: int, axis: int) -> float:
    """The number u in [0, 1) of a document.

    Args:
        seed: of the training.
        epoch: of the data; -1 in evaluation.
        position: place of the document in the order of the epoch.
        axis: numbers of different axes are independent of each other over many documents. From the ninth on, they are
            drawn at random and not spread.
    """
    if axis >= len(_STEPS):
        generator = generator_for(seed, "times", epoch, axis, position)
        return float(torch.rand((), generator=generator, dtype=torch.float64))
    return (_offset(seed, epoch, axis) + position * _STEPS[axis]) % 1.0


def draw_time(seed: int, epoch: int, position: int, axis: int, times: tuple[float, float] = (SMALLEST, 1.0)) -> float:
    """A time t in a range, by default [10⁻³, 1): below, the bound's weight 1/t makes gradients of rare events too large
    to learn from."""
    low, high = times
    return low + (high - low) * spread_uniform(seed, epoch, position, axis)


def times_of_blocks(t_S: Tensor, source_S: Tensor, times: tuple[float, float]) -> Tensor:
    """A time for each block, float64 [S], of which every one is uniform and those of a segment are spread evenly.

    Args:
        t_S: the time of the segment that each block is of, which its first block keeps.
        source_S: that segment; the blocks of a segment follow each other.
        times: the range of times.
    """
    low, high = times
    first_S = torch.searchsorted(source_S, source_S)
    place_S = torch.arange(len(source_S)) - first_S
    return low + (high - low) * (((t_S - low) / (high - low) + place_S * _BLOCKS) % 1.0)


@lru_cache(maxsize=64)
def _offset(seed: int, epoch: int, axis: int) -> float:
    return float(torch.rand((), generator=generator_for(seed, "times", epoch, axis), dtype=torch.float64))
