"""Samplers: exact where they claim to be, counts as published, known tokens and batches respected."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import AmusedScheduler, BlockRefinementScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from multidiff.samplers import MaskSampler, as_sampler
from multidiff.samplers.guidance import guide, scale_at
from multidiff.samplers.token_sampling import sample_tokens
from multidiff.samplers.unmasking import SCHEDULES
from tests.helpers.sampling import conditionals, run
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


@given(st.integers(1, 300), st.integers(1, 64))
def test_schedules_follow_their_definitions(unknown, steps):
    steps = min(steps, unknown)
    shares = {
        "cosine": lambda r: math.cos(math.pi / 2 * r),
        "arccos": lambda r: math.acos(r) / (math.pi / 2),
        "power": lambda r: 1 - r**3,
    }
    assert SCHEDULES["linear"](unknown, steps) == [
        unknown // steps + (k < unknown % steps) for k in range(steps)
    ]  # LLaDA
    for name, share in shares.items():
        decided = SCHEDULES[name](unknown, steps, **({"exponent": 3} if name == "power" else {}))
        assert len(decided) == steps
        assert sum(decided) == unknown
        assert min(decided) >= 1
        left = unknown
        for k, number in enumerate(decided[:-1]):  # MaskGIT
            kept = math.floor(unknown * share((k + 1) / steps) + 1e-9)
            assert left - number in (max(1, min(left - 1, kept)), max(1, min(left - 1, kept - 1)))
            left -= number


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["random", "confidence"]),
    st.sampled_from(["linear", "cosine"]),
    st.integers(1, 12),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(0, 1000),
)
def test_everything_is_decided_and_nothing_twice(order, count, steps, lengths, seed):
    width = max(lengths)
    sample_RN = torch.where(torch.arange(width) < torch.tensor(lengths)[:, None], 4, -1)
    table_NV = torch.randn(width, 4, generator=generator(seed))
    table_NV[:, 2] = -torch.inf
    sampler = MaskSampler(order=order, unmasking=count, temperature=0.7, top_p=0.9)
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


def test_draws_follow_the_distribution_in_fp64():
    p_V = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
    uniform_M = torch.rand(20_000, generator=generator(), dtype=torch.float64)
    uniform_M[:3] = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    candidates = sample_tokens(p_V.log().expand(20_000, 4), uniform_M, temperature=1.0, top_p=1.0)
    assert candidates.token_M[:3].tolist() == [0, 2, 3]
    counts = torch.bincount(candidates.token_M, minlength=4)
    assert counts[1] == 0
    assert chisquare(counts[[0, 2, 3]].numpy(), [10_000, 6_000, 4_000]).pvalue > 1e-3
    torch.testing.assert_close(candidates.log_p_M, p_V.log()[candidates.token_M])
    cut = sample_tokens(p_V.log().expand(20_000, 4), uniform_M, temperature=1.0, top_p=0.6)
    assert set(cut.token_M.tolist()) == {0, 2}
    cold = sample_tokens(p_V.log().expand(20_000, 4), uniform_M, temperature=0.5, top_p=1.0)
    squared = p_V**2 / (p_V**2).sum() * 20_000
    counts = torch.bincount(cold.token_M, minlength=4)
    assert chisquare(counts[[0, 2, 3]].numpy(), squared[[0, 2, 3]].numpy()).pvalue > 1e-3


def test_guidance():
    conditional = torch.tensor([[0.0, 1.0, -torch.inf]])
    unconditional = torch.tensor([[0.5, 0.5, -torch.inf]])
    assert guide(conditional, [(unconditional, 1.0)]).tolist() == conditional.tolist()
    assert guide(conditional, [(unconditional, 3.0)]).tolist() == [[-1.0, 2.0, -torch.inf]]
    assert guide(conditional, [(unconditional, 3.0), (torch.zeros(1, 3), 2.0)]).tolist() == [[-1.0, 3.0, -torch.inf]]
    steps_R = torch.tensor([3, 1, 5])
    assert [scale_at(3.0, "linear", k, steps_R).tolist() for k in range(3)] == [[1, 3, 1], [2, 3, 1.5], [3, 3, 2]]
    assert [scale_at(3.0, [0.25, 0.5], k, torch.tensor([4])).tolist() for k in range(4)] == [[1], [3], [3], [1]]
    assert scale_at(3.0, "constant", 0, steps_R).tolist() == [3, 3, 3]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["linear", "cosine", "arccos", "power"]),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), min_size=1, max_size=8),
    st.one_of(st.integers(1, 30), st.just("level")),
    st.integers(0, 60),
)
def test_plans_are_the_schedules_of_the_blocks(count, levels, block_length, more):
    """The steps that are left when every block has one go to blocks in proportion to what is left of these."""
    levels_N = torch.tensor([level for level, number in levels for _ in range(number)])
    number = len(levels_N)
    blocks = levels_N.tolist() if block_length == "level" else [n // block_length for n in range(number)]
    sizes = [blocks.count(block) for block in sorted(set(blocks))]
    steps = min(len(sizes) + more, number)
    expected, taken = [], 0
    for block, size in enumerate(sizes):
        left = sum(sizes[: block + 1]) - (block + 1)
        until = (steps - len(sizes)) * left // max(1, number - len(sizes)) + block + 1
        expected += SCHEDULES[count](size, until - taken, **({"exponent": 2.0} if count == "power" else {}))
        taken = until
    sampler = MaskSampler(unmasking=count, block_length=block_length, exponent=2.0 if count == "power" else None)
    sample_RN, zeros_13 = torch.full((1, number), 5), torch.zeros(1, number, 3, dtype=torch.int64)
    state = sampler.start(sample_RN, levels_N[None], zeros_13, steps)
    assert state.decide_RK[0].tolist() == expected
    assert state.steps == steps


@pytest.mark.parametrize("options", [{}, {"draw": "gumbel"}, {"temperature": 0.0}, {"top_p": 0.9}, {"order": "margin"}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_named(options, bad):
    logits_NV = torch.zeros(3, 4, dtype=torch.float64)
    logits_NV[1, 2] = bad
    with pytest.raises(ValueError, match="logits hold NaN or Inf: check its weights"):
        run(MaskSampler(**options), torch.full((1, 3), 4), 1, lambda row_N: logits_NV, [generator()])


@pytest.mark.parametrize("scheduler", [AmusedScheduler(mask_token_id=4), BlockRefinementScheduler()])
def test_schedulers_get_no_such_logits(scheduler):
    logits_NV = torch.full((3, 4), math.nan)
    with pytest.raises(ValueError, match="logits hold NaN or Inf"):
        run(as_sampler(scheduler), torch.full((1, 3), 4), 1, lambda row_N: logits_NV, [generator()])


def test_settings_survive_and_bad_ones_are_named(tmp_path):
    sampler = MaskSampler(order="random", unmasking="linear", top_p=0.9, canvas={"frames": 7})
    assert MaskSampler.from_settings(sampler.settings, "x").settings == sampler.settings
    sampler.save_pretrained(tmp_path)
    assert MaskSampler.from_pretrained(tmp_path).settings == sampler.settings
    with pytest.raises(ValueError, match=r"x.json: no sampler setting is called 'temprature'; did you mean 'tempe"):
        MaskSampler.from_settings({"temprature": 1}, "x.json")
