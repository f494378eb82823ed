"""Absorbing noise, against the forward process written out over a tiny vocabulary."""

import math

import pytest
import torch

from multidiff.processes import Absorbing, Cosine, CosineSquared, Geometric, LogLinear, Polynomial
from multidiff.sequence import MASK
from tests.helpers.toys import generator

SCHEDULES = [LogLinear(), LogLinear(0.0), Cosine(), Cosine(0.0), CosineSquared(), Polynomial(3.0), Geometric()]
IDS_P = torch.tensor([2, 5, 9, 10, 9, 6])
SPAN_P = torch.tensor([-1, -1, 0, 1, 0, -1])
SPANS_S2 = torch.tensor([[9, 10], [10, 12]])


def uniform(*values):
    return lambda: torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_token_is_masked_with_probability_one_minus_alpha(schedule):
    """Exactly where its uniform number lies below; structure and what has time 0 stay as they are."""
    process = Absorbing(schedule)
    t_P = torch.tensor([0.7, 0.0, 0.7, 0.7, 0.0, 1.0], dtype=torch.float64)
    limit = 1 - float(schedule.alpha(torch.tensor(0.7, dtype=torch.float64)))
    below = process.corrupt(IDS_P, SPAN_P, SPANS_S2, t_P, uniform(0, 0, limit - 1e-12, limit + 1e-12, 0, 0))
    assert below.ids_P.tolist() == [2, 5, MASK, 10, 9, 6]
    assert below.predicted_P.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine(0.05), CosineSquared(), Polynomial(), Geometric()])
@pytest.mark.parametrize("t", [0.3, 1.0])
def test_the_share_of_masks_follows_the_schedule(schedule, t):
    """Within 4 standard deviations: it fails by chance once in 16,000 times."""
    count, drawn = 32_000, generator()
    ids_P, span_P = torch.full((count,), 9), torch.zeros(count, dtype=torch.int64)
    t_P = torch.full((count,), t, dtype=torch.float64)
    made = Absorbing(schedule).corrupt(
        ids_P, span_P, SPANS_S2, t_P, lambda: torch.rand(count, generator=drawn, dtype=torch.float64)
    )
    expected = 1 - float(schedule.alpha(t_P[0]))
    share = float(made.predicted_P.double().mean())
    assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / count)
    assert torch.equal(made.ids_P == MASK, made.predicted_P)


def test_the_prior_is_masks():
    assert Absorbing().prior(torch.tensor([3, 5]), torch.rand(2)).tolist() == [3, 5]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_weight_is_that_of_the_bound(schedule):
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    weight, of_codes = Absorbing(schedule).weights(t)
    torch.testing.assert_close(weight, -slope / (1 - alpha), rtol=1e-12, atol=0)
    assert not of_codes.any()


def test_the_posterior_of_half_precision_is_in_fp64():
    log_MV = torch.log_softmax(torch.randn(2, 3, generator=generator()), -1).bfloat16()
    ids_M, sizes_M = torch.tensor([3, 1]), torch.tensor([3, 3])
    ours = Absorbing().posterior(log_MV, ids_M, sizes_M, 0.9, 0.4)
    torch.testing.assert_close(ours, Absorbing().posterior(log_MV.double(), ids_M, sizes_M, 0.9, 0.4))


def test_two_steps_of_the_posterior_are_one():
    process, size = Absorbing(Cosine()), 4
    log_V = torch.log_softmax(torch.randn(1, size, generator=generator(), dtype=torch.float64), -1)
    mask, sizes = torch.tensor([size]), torch.tensor([size])
    first, second = (process.posterior(log_V, mask, sizes, *times).exp() for times in ((0.9, 0.6), (0.6, 0.2)))
    together = first[:, -1:] * second + torch.cat([first[:, :-1], torch.zeros(1, 1)], 1)
    torch.testing.assert_close(together, process.posterior(log_V, mask, sizes, 0.9, 0.2).exp())
