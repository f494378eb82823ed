"""Orders against their definitions."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from multidiff.samplers import MaskSampler
from multidiff.samplers.order import halton_ranks
from tests.helpers.sampling import drive, run
from tests.helpers.toys import generator


def test_confidence_decides_the_surest_first_and_ties_by_position():
    p_NV = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], dtype=torch.float64)
    seen = []
    sampler = MaskSampler(order="confidence", unmasking="linear", temperature=0.0)
    final_RN = run(sampler, torch.full((1, 4), 2), 4, lambda row_N: p_NV.log(), [generator()], seen)
    orders = [int((row[0] != 2).sum()) for row in seen]
    assert orders == [1, 2, 3, 4]
    decided = [set(torch.nonzero(row[0] != 2).flatten().tolist()) for row in seen]
    assert decided == [{1}, {1, 3}, {0, 1, 3}, {0, 1, 2, 3}]
    assert final_RN.tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize("size", [2, 5])
def test_order_noise_is_gumbel_and_anneals(size):
    """Position n comes first with probability softmax(log p / τ')_n (the Gumbel-max trick); after the first of K steps
    the scale has come down to τ' = τ·(1 - 1/K)."""
    temperature, runs = 0.8, 3000
    sure_N = torch.linspace(0.55, 0.95, size, dtype=torch.float64)
    log_p_NV = torch.stack([sure_N, 1 - sure_N], -1).log()
    sampler = MaskSampler(order="confidence", unmasking="linear", order_temperature=temperature, temperature=0.0)
    seen = []
    generators = [generator(seed) for seed in range(runs)]
    run(sampler, torch.full((runs, size), 2), size, lambda row_N: log_p_NV, generators, seen)
    first_N = (seen[0] != 2).sum(0)
    assert int(first_N.sum()) == runs
    expected_N = torch.softmax(sure_N.log() / (temperature * (1 - 1 / size)), 0) * runs
    assert chisquare(first_N.numpy(), expected_N.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (4, 4), (8, 5), (64, 64)])
def test_halton_covers_every_cell_once(height, width):
    ranks = halton_ranks(height, width)
    assert sorted(ranks.flatten().tolist()) == list(range(height * width))
    if height * width >= 16:  # spread: the first quarter of the cells is in all quarters of the grid
        early = np.argwhere(ranks < height * width // 4 + 1)
        assert np.ptp(early[:, 1]) >= width // 2
    if (height, width) == (4, 4):  # 1/2, 1/3; 1/4, 2/3; 3/4, 1/9; 1/8, 4/9
        assert [ranks[2, 1], ranks[1, 2], ranks[3, 0], ranks[0, 1]] == [0, 1, 2, 3]


def grid(height, width):
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))[None]


def decided_in_turn(sampler, coords_RN3, levels_RN=None, size=3, extent_RN3=None):
    """Which positions are decided at each step, for a model that is surest of the last position."""
    number = coords_RN3.shape[1]
    logits_NV = torch.zeros(number, size, dtype=torch.float64)
    logits_NV[:, 0] = torch.arange(number)
    sample_RN, seen = torch.full((1, number), size), []
    more = {"levels_RN": levels_RN, "coords_RN3": coords_RN3, "extent_RN3": extent_RN3}
    drive(sampler, sample_RN, number, lambda row_N: logits_NV, [generator()], seen=seen, **more)
    made = [sample_RN, *(made_RN for _, made_RN, _ in seen)]
    return [torch.nonzero(after[0] != before[0]).flatten().tolist() for before, after in pairwise(made)]


def test_orders_by_place():
    line_RN3 = torch.arange(5)[None, :, None].expand(1, 5, 3)
    linear = {"unmasking": "linear", "temperature": 0.0}
    assert decided_in_turn(MaskSampler(order="left_to_right", **linear), line_RN3) == [[0], [1], [2], [3], [4]]
    assert decided_in_turn(MaskSampler(order="row_scan", **linear), grid(2, 2)) == [[0], [1], [2], [3]]
    ranks = torch.from_numpy(halton_ranks(3, 4)).flatten()
    assert decided_in_turn(MaskSampler(order="halton", **linear), grid(3, 4)) == [[int(n)] for n in ranks.argsort()]
    # Some cells are known, the last row among them: the others keep their turn.
    some = [1, 2, 6, 7]
    extent_RN3 = torch.tensor([1, 3, 4]).expand(1, 4, 3)
    turns = decided_in_turn(MaskSampler(order="halton", **linear), grid(3, 4)[:, some], extent_RN3=extent_RN3)
    assert [some[n] for (n,) in turns] == sorted(some, key=lambda n: int(ranks[n]))
    with pytest.raises(ValueError, match=r"order 'halton' needs codes on a grid.*order 'left_to_right'"):
        decided_in_turn(MaskSampler(order="halton"), line_RN3)
    with pytest.raises(ValueError, match=r"order 'left_to_right' needs codes in a line.*order 'row_scan'"):
        decided_in_turn(MaskSampler(order="left_to_right"), grid(2, 2))


def test_coarse_to_fine_and_blocks():
    levels_RN = torch.arange(3).repeat(2)[None]
    coords_RN3 = torch.stack([torch.arange(2).repeat_interleave(3), levels_RN[0], torch.zeros(6)], -1)[None].long()
    linear = {"unmasking": "linear", "temperature": 0.0}
    sure = decided_in_turn(MaskSampler(**linear), coords_RN3, levels_RN)
    assert sure == [[5], [4], [3], [2], [1], [0]]
    by_level = [[3], [0], [4], [1], [5], [2]]
    assert decided_in_turn(MaskSampler(level_penalty=100.0, **linear), coords_RN3, levels_RN) == by_level
    assert decided_in_turn(MaskSampler(block_length="level", **linear), coords_RN3, levels_RN) == by_level
    soft = decided_in_turn(MaskSampler(level_penalty=0.2, **linear), coords_RN3, levels_RN)
    assert soft not in (sure, by_level)
    blocks = decided_in_turn(MaskSampler(block_length=4, **linear), coords_RN3, levels_RN)
    assert blocks == [[3], [2], [1], [0], [5], [4]]
    with pytest.raises(ValueError, match="num_inference_steps 1 is less than the 2 blocks of block_length 4"):
        MaskSampler(block_length=4).start(
            torch.full((1, 6), 3), levels_RN, coords_RN3, num_inference_steps=1, generator=[generator()]
        )
