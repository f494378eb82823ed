"""Samplers ask for the logits that their next step reads, and for no others."""

import itertools

import pytest
import torch
from scipy.stats import chisquare

from multidiff.samplers import MaskSampler
from tests.helpers.sampling import conditionals, drive, network
from tests.helpers.toys import generator

LENGTHS = (6, 4, 1)
SIZE = 4


def asked(sampler, steps=4, seed=0, coords_RN3=None, **more):
    """(where_RN, before_RN, after_RN) of each step, on three rows of 6, 4 and 1 codes."""
    sample_RN = torch.where(torch.arange(6) < torch.tensor(LENGTHS)[:, None], SIZE, -1)
    model, seen = network(6, SIZE, seed), []
    generators = [generator(seed + row) for row in range(len(LENGTHS))]

    def of_row(row_N):
        return model(row_N.where(row_N >= 0, SIZE))

    drive(sampler, sample_RN, steps, of_row, generators, coords_RN3=coords_RN3, seen=seen, **more)
    made = [sample_RN, *(made_RN for _, made_RN, _ in seen)]
    return [
        (where_RN, before_RN, after_RN)
        for (where_RN, _, _), before_RN, after_RN in zip(seen, made, made[1:], strict=False)
    ]


GRID_RN3 = torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(3)).expand(3, 6, 3)


@pytest.mark.parametrize("order", ["left_to_right", "row_scan", "halton", "random"])
@pytest.mark.parametrize("unmasking", ["linear", "cosine", "arccos", "power"])
@pytest.mark.parametrize("more", [{}, {"block_length": 3}, {"top_p": 0.9, "repetition_penalty": 1.5}], ids=str)
def test_orders_that_are_known_beforehand_ask_for_what_they_decide(order, unmasking, more):
    options = {"order": order, "unmasking": unmasking, "exponent": 2.0 if unmasking == "power" else None, **more}
    coords_RN3 = GRID_RN3 if order in ("row_scan", "halton") else None
    steps = asked(MaskSampler(**options), coords_RN3=coords_RN3)
    for where_RN, before_RN, after_RN in steps:
        assert torch.equal(where_RN, before_RN != after_RN)
    assert sum(int(where_RN.sum()) for where_RN, _, _ in steps) == sum(LENGTHS)


def test_a_level_penalty_is_known_beforehand_too():
    levels_RN = torch.tensor([0, 1, 0, 1, 0, 1]).expand(3, 6)
    sampler = MaskSampler(order="left_to_right", unmasking="linear", level_penalty=9.0)
    steps = asked(sampler, steps=6, levels_RN=levels_RN)
    assert [torch.nonzero(where_RN[0]).flatten().tolist() for where_RN, _, _ in steps] == [[0], [2], [4], [1], [3], [5]]


@pytest.mark.parametrize("remask", ["none", "cap", "rescale", "conf", "loop"])
def test_the_ancestral_process_asks_for_what_it_decides(remask):
    eta = 0.5 if remask in ("cap", "rescale", "loop") else None
    steps = asked(MaskSampler(order="random", unmasking="ancestral", remask=remask, eta=eta), steps=20)
    again = 0
    for where_RN, before_RN, after_RN in steps:
        assert torch.equal(where_RN, (before_RN == SIZE) & (after_RN != SIZE))
        again += int(((before_RN != SIZE) & (after_RN == SIZE)).sum())
    assert any(not bool(where_RN.any()) for where_RN, _, _ in steps)
    assert sum(int(where_RN.sum()) for where_RN, _, _ in steps) == sum(LENGTHS) + again
    assert (again > 0) == (remask != "none")


@pytest.mark.parametrize(
    "options", [{}, {"order": "margin"}, {"order": "left_to_right", "order_temperature": 1.0}], ids=str
)
def test_other_orders_ask_for_all_that_is_undecided(options):
    steps = asked(MaskSampler(unmasking="linear", **options))
    for where_RN, before_RN, _ in steps:
        assert torch.equal(where_RN, before_RN == SIZE)


def test_editing_asks_for_what_is_decided_as_well():
    sampler = MaskSampler(order="left_to_right", unmasking="linear", remask="edit", editing_threshold=0.5)
    for where_RN, before_RN, after_RN in asked(sampler, steps=6):
        decides_RN = (before_RN == SIZE) & (after_RN != SIZE)
        decided_RN = (before_RN >= 0) & (before_RN != SIZE)
        assert torch.equal(where_RN, decides_RN | (decided_RN & decides_RN.any(1, keepdim=True)))


@pytest.mark.parametrize("steps", [3, 2, 1])
def test_a_random_order_is_the_any_order_process(steps):
    """A model that contradicts itself: each order gives another distribution. All are enumerated."""
    size, number = 2, 8000
    model = network(3, size, 3)
    groups = {3: (1, 1, 1), 2: (2, 1), 1: (3,)}[steps]
    share = dict.fromkeys(itertools.product(range(size), repeat=3), 0.0)
    for order in itertools.permutations(range(3)):
        for tokens in share:
            row, first, p = [size] * 3, 0, 1 / 6
            for group in groups:
                p_NV = torch.softmax(model(torch.tensor(row)), -1)
                for n in order[first : first + group]:
                    p *= float(p_NV[n, tokens[n]])
                for n in order[first : first + group]:
                    row[n] = tokens[n]
                first += group
            share[tokens] += p
    assert sum(share.values()) == pytest.approx(1)
    seen = []
    blank_RN = torch.full((number, 3), size)
    sampler = MaskSampler(order="random", unmasking="linear")
    drawn_RN, _ = drive(sampler, blank_RN, steps, model, [generator(4)] * number, seen=seen)
    counts = [int((drawn_RN == torch.tensor(tokens)).all(1).sum()) for tokens in share]
    assert chisquare(counts, [p * number for p in share.values()]).pvalue > 1e-3
    if steps == 3:  # every permutation is equally likely
        turn_RN = torch.stack([where_RN.int() for where_RN, _, _ in seen]).argmax(0)
        orders = torch.unique(turn_RN, dim=0, return_counts=True)[1]
        assert len(orders) == 6
        assert chisquare(orders.numpy()).pvalue > 1e-3


def test_the_ancestral_process_with_few_steps():
    """In one step all positions are decided at once: the joint is the product of the marginals."""
    joint = torch.rand(2, 2, 2, generator=generator(0), dtype=torch.float64) ** 3
    joint /= joint.sum()
    number, model = 6000, conditionals(joint)
    sampler = MaskSampler(order="random", unmasking="ancestral")
    drawn_RN, _ = drive(sampler, torch.full((number, 3), 2), 1, model, [generator(1)] * number)
    p_NV = torch.softmax(model(torch.full((3,), 2)), -1)
    states = list(itertools.product(range(2), repeat=3))
    expected = [float(torch.stack([p_NV[n, token] for n, token in enumerate(state)]).prod()) for state in states]
    counts = [int((drawn_RN == torch.tensor(state)).all(1).sum()) for state in states]
    assert chisquare(counts, [p * number for p in expected]).pvalue > 1e-3
