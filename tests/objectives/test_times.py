"""Times: formula, evenness, and uniformity."""

import itertools
import math
from decimal import Decimal, getcontext

import pytest
import torch

from multidiff.objectives.times import SMALLEST, draw_time, spread_uniform
from tests.helpers.toys import generator


def discrepancy(numbers):
    """The greatest difference between the share of numbers below x and x (Kolmogorov and Smirnov's statistic)."""
    count = len(numbers)
    ranks = enumerate(sorted(numbers))
    return max(max((rank + 1) / count - u, u - rank / count) for rank, u in ranks)


@pytest.mark.parametrize("axis", range(8))
def test_a_run_of_neighbours_is_spread_better_than_independent_draws(axis):
    """All runs of 16 and more documents, each against the mean of independent draws of that number."""
    drawn = generator(axis)
    for count in (16, 32, 64, 200):
        independent = [
            discrepancy(torch.rand(count, generator=drawn, dtype=torch.float64).tolist()) for _ in range(200)
        ]
        mean = sum(independent) / len(independent)
        for start in range(0, 150, 7):
            run = [spread_uniform(3, 1, start + place, axis) for place in range(count)]
            assert discrepancy(run) < 0.85 * mean, (count, start)


def test_short_runs_of_the_first_axis_are_even_too():
    for count in (4, 6, 8, 12):
        for start in range(60):
            run = [spread_uniform(5, 0, start + place, 0) for place in range(count)]
            assert discrepancy(run) < 0.8687 / math.sqrt(count)  # the limit of the mean of independent draws


def test_numbers_are_a_kronecker_sequence():
    getcontext().prec = 40
    golden = (Decimal(5).sqrt() - 1) / 2
    offset = Decimal(spread_uniform(7, 2, 0, 0))
    for position in (1, 2, 1000, 10**6):
        expected = float((offset + position * golden) % 1)
        assert abs(spread_uniform(7, 2, position, 0) - expected) < 1e-9


@pytest.mark.parametrize("axis", [0, 3])
def test_every_number_is_uniform_over_epochs_and_seeds(axis):
    """Chi-square with 19 degrees of freedom: above 43.8 once in 1,000 times."""
    for position in (0, 11):
        for numbers in (
            [spread_uniform(1, epoch, position, axis) for epoch in range(2000)],
            [spread_uniform(seed, 0, position, axis) for seed in range(2000)],
        ):
            counts = torch.bincount((torch.tensor(numbers, dtype=torch.float64) * 20).long(), minlength=20)
            assert float(((counts - 100) ** 2 / 100).sum()) < 43.8


@pytest.mark.parametrize("other", range(1, 8))
def test_axes_are_jointly_even(other):
    """Of 2,048 documents, each of the 16 cells of two axes holds as many within 4 standard deviations of chance."""
    cells = torch.zeros(4, 4)
    for position in range(2048):
        cells[int(4 * spread_uniform(0, 0, position, 0)), int(4 * spread_uniform(0, 0, position, other))] += 1
    assert float((cells - 128).abs().max()) < 4 * math.sqrt(128 * 15 / 16)


def test_times_are_the_numbers_between_the_smallest_and_one():
    for position in range(50):
        u = spread_uniform(1, 4, position, 1)
        assert 0 <= u < 1
        assert draw_time(1, 4, position, 1) == pytest.approx(SMALLEST + (1 - SMALLEST) * u, abs=1e-15)
    assert SMALLEST == 1e-3


def test_numbers_differ_by_seed_epoch_position_and_axis():
    keys = itertools.product((0, 1), repeat=4)
    assert len({round(spread_uniform(*key), 9) for key in keys}) == 16
