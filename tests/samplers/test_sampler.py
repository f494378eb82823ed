"""Samplers: exact where they claim to be, known tokens and batches respected."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from multidiff.samplers import MaskSampler
from tests.helpers.sampling import conditionals, network, run
from tests.helpers.toys import generator


@pytest.mark.parametrize("seed", [0, 1])
def test_random_order_one_at_a_time_samples_the_joint(seed):
    joint = torch.rand(3, 3, 3, generator=generator(seed), dtype=torch.float64) ** 4
    joint /= joint.sum()
    number = 6000
    masked_RN = torch.full((number, 3), 3)
    sampler = MaskSampler(order="random", unmasking="linear")
    drawn_RN = run(sampler, masked_RN, 3, conditionals(joint), [generator(seed + 2)] * number)
    counts = torch.zeros(3, 3, 3).index_put((*drawn_RN.T,), torch.ones(number), accumulate=True)
    likely = joint * number >= 5
    observed = [*counts[likely].tolist(), float(counts[~likely].sum())]
    expected = [*(joint[likely] * number).tolist(), float(joint[~likely].sum() * number)]
    if expected[-1] == 0:
        observed.pop(), expected.pop()
    assert chisquare(observed, expected, sum_check=False).pvalue > 1e-3
    # The test can tell: all three at once ignore how they depend on each other.
    at_once_RN = run(sampler, masked_RN, 1, conditionals(joint), [generator(seed)] * number)
    counts = torch.zeros(3, 3, 3).index_put((*at_once_RN.T,), torch.ones(number), accumulate=True)
    observed = [*counts[likely].tolist(), float(counts[~likely].sum())][: len(expected)]
    assert chisquare(observed, expected, sum_check=False).pvalue < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["random", "confidence"]),
    st.sampled_from(["linear", "cosine"]),
    st.integers(1, 12),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(0, 1000),
)
def test_everything_is_decided_and_nothing_twice(order, unmasking, steps, lengths, seed):
    width = max(lengths)
    sample_RN = torch.where(torch.arange(width) < torch.tensor(lengths)[:, None], 4, -1)
    table_NV = torch.randn(width, 4, generator=generator(seed))
    table_NV[:, 2] = -torch.inf
    sampler = MaskSampler(order=order, unmasking=unmasking, temperature=0.7, top_p=0.9)
    generators = [generator(seed + row) for row in range(len(lengths))]
    seen = [sample_RN]
    final_RN = run(sampler, sample_RN, steps, lambda row_N: table_NV, generators, seen)
    assert torch.equal(final_RN < 0, sample_RN < 0)
    assert bool((final_RN[sample_RN >= 0] < 4).all())
    assert bool((final_RN != 2).all())
    for before, after in pairwise(seen):
        decided_RN = before != 4
        assert torch.equal(before[decided_RN], after[decided_RN])
    # The same row alone, with its own generator, gives the same tokens.
    row = len(lengths) // 2
    alone_RN = run(
        sampler,
        sample_RN[row : row + 1, : lengths[row]],
        steps,
        lambda row_N: table_NV[: len(row_N)],
        [generator(seed + row)],
    )
    assert torch.equal(alone_RN[0], final_RN[row, : lengths[row]])


SAMPLERS = [
    *(
        {"order": order, "unmasking": "cosine"}
        for order in ("random", "confidence", "margin", "entropy", "left_to_right")
    ),
    {"unmasking": "arccos", "order_temperature": 2.0},
    {"unmasking": "power", "exponent": 2.0, "top_k": 3, "typical_p": 0.9},
    {"unmasking": "linear", "block_length": 3, "draw": "gumbel"},
    {"unmasking": "threshold", "threshold": 0.4},
    {"unmasking": "factor", "factor": 1.2, "block_length": 3},
    {"order": "entropy", "unmasking": "entropy_bound", "entropy_bound": 1.0},
    {"order": "random", "unmasking": "ancestral"},
    {"order": "random", "unmasking": "ancestral", "remask": "cap", "eta": 0.2},
    {"order": "random", "unmasking": "ancestral", "remask": "conf"},
    {"unmasking": "linear", "remask": "edit", "editing_threshold": 0.4},
    {"unmasking": "linear", "repetition_penalty": 2.0, "suppress_tokens": [1]},
]


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 100))
def test_every_row_is_as_if_alone(options, lengths, seed):
    sampler, width, size = MaskSampler(**options), max(lengths), 4
    model = network(9, size, seed)

    def of_row(row_N):
        padded = torch.full((9,), size)
        padded[: len(row_N)] = torch.where(row_N < 0, size, row_N)
        return model(padded)[: len(row_N)]

    def made(sample_RN, seeds):
        steps = None if sampler.is_adaptive else 4
        return run(sampler, sample_RN, steps, of_row, [generator(seed) for seed in seeds])

    blank_RN = torch.where(torch.arange(width) < torch.tensor(lengths)[:, None], size, -1)
    seeds = [seed + row for row in range(len(lengths))]
    together_RN = made(blank_RN, seeds)
    assert torch.equal(together_RN < 0, blank_RN < 0)
    assert bool((together_RN < size).all())
    backwards_RN = made(blank_RN.flip(0), seeds[::-1]).flip(0)
    assert torch.equal(together_RN, backwards_RN)
    for row, length in enumerate(lengths):
        alone_RN = made(blank_RN[row : row + 1, :length], seeds[row : row + 1])
        assert torch.equal(alone_RN[0], together_RN[row, :length])
