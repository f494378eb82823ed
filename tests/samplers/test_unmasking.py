"""How many positions a step decides, against the definitions."""

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from multidiff.samplers import MaskSampler
from multidiff.samplers.unmasking import SCHEDULES, entropy_bound, factor, threshold
from tests.helpers.toys import generator


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


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=12), st.floats(0.01, 0.99))
def test_adaptive_counts(probabilities, bound):
    probs_N = torch.tensor(sorted(probabilities, reverse=True), dtype=torch.float64)
    padded_RN = torch.cat([probs_N, torch.full((2,), -1.0, dtype=torch.float64)])[None]
    assert int(threshold(padded_RN, bound)) == max(1, sum(p >= bound for p in probabilities))
    fitting = [n for n in range(1, len(probs_N) + 1) if (n + 1) * (1 - float(probs_N[n - 1])) < 3 * bound]
    assert int(factor(padded_RN, 3 * bound)) == max(fitting, default=1)
    padded_RN = torch.cat([probs_N.flip(0), torch.full((2,), torch.inf, dtype=torch.float64)])[None]
    before = [float(probs_N.flip(0)[:n].sum()) for n in range(len(probs_N))]
    assume(all(abs(total - bound) > 1e-9 for total in before))
    assert int(entropy_bound(padded_RN, bound)) == sum(total <= bound for total in before)
    empty_RN = torch.full((1, 3), -1.0, dtype=torch.float64)
    assert int(threshold(empty_RN, bound)) == int(factor(empty_RN, bound)) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["linear", "cosine", "arccos", "power"]),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), min_size=1, max_size=8),
    st.one_of(st.integers(1, 30), st.just("level")),
    st.integers(0, 60),
)
def test_plans_are_the_schedules_of_the_blocks(unmasking, levels, block_length, more):
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
        expected += SCHEDULES[unmasking](size, until - taken, **({"exponent": 2.0} if unmasking == "power" else {}))
        taken = until
    sampler = MaskSampler(
        unmasking=unmasking, block_length=block_length, exponent=2.0 if unmasking == "power" else None
    )
    sample_RN, zeros_RN3 = torch.full((1, number), 5), torch.zeros(1, number, 3, dtype=torch.int64)
    state = sampler.start(sample_RN, levels_N[None], zeros_RN3, num_inference_steps=steps, generator=[generator()])
    assert state.plan_RK[0].tolist() == expected
    assert state.steps == steps
