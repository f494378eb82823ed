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


def uniform(*values):
    return lambda: torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_token_is_masked_with_probability_one_minus_alpha(schedule):
    """Exactly where its uniform number lies below; structure and what has time 0 stay as they are."""
    process = Absorbing(schedule)
    t_P = torch.tensor([0.7, 0.0, 0.7, 0.7, 0.0, 1.0], dtype=torch.float64)
    limit = 1 - float(schedule.alpha(torch.tensor(0.7, dtype=torch.float64)))
    below = process.corrupt(IDS_P, SPAN_P, t_P, uniform(0, 0, limit - 1e-12, limit + 1e-12, 0, 0))
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
        ids_P, span_P, t_P, lambda: torch.rand(count, generator=drawn, dtype=torch.float64)
    )
    expected = 1 - float(schedule.alpha(t_P[0]))
    share = float(made.predicted_P.double().mean())
    assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / count)
    assert torch.equal(made.ids_P == MASK, made.predicted_P)


def test_the_prior_is_masks_outside_of_structure():
    def unused():
        raise AssertionError("nothing is random here")

    assert Absorbing().prior(IDS_P, SPAN_P, unused).tolist() == [2, 5, MASK, MASK, MASK, 6]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_weight_is_that_of_the_bound(schedule):
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(Absorbing(schedule).weight(t), -slope / (1 - alpha), rtol=1e-12, atol=0)


def forward(alpha, size):
    """q(x | clean token) as rows over size tokens and `<mask>`."""
    table = torch.zeros(size, size + 1, dtype=torch.float64)
    for token in range(size):
        table[token, token], table[token, size] = alpha, 1 - alpha
    return table


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("t", "s"), [(0.9, 0.4), (1.0, 0.0), (0.31, 0.3), (0.2, 0.0), (1.0, 0.97)])
def test_the_posterior_is_bayes_rule(schedule, t, s):
    size = 3
    alpha_t, alpha_s = (float(schedule.alpha(torch.tensor(x, dtype=torch.float64))) for x in (t, s))
    clean_VX, noised_VX = forward(alpha_s, size), forward(alpha_t, size)  # q(x_s | x_0), q(x_t | x_0)
    step_XX = torch.zeros(size + 1, size + 1, dtype=torch.float64)  # q(x_t | x_s): a mask stays one
    step_XX[size, size] = 1
    step_XX[:size] = forward(alpha_t / alpha_s, size)
    torch.testing.assert_close(clean_VX @ step_XX, noised_VX)
    ids_M = torch.arange(size + 1)
    probs_MV = torch.rand(size + 1, size, generator=generator(), dtype=torch.float64)
    probs_MV /= probs_MV.sum(1, keepdim=True)
    expected_MX = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    for x_t in range(size + 1):
        # What is not masked shows x_0, whatever the model says; where it is, the model says how likely each x_0 is.
        belief_V = probs_MV[x_t] if x_t == size else torch.eye(size, dtype=torch.float64)[x_t]
        for x_0 in range(size):
            if belief_V[x_0]:
                bayes_X = step_XX[:, x_t] * clean_VX[x_0] / noised_VX[x_0, x_t]
                expected_MX[x_t] += belief_V[x_0] * bayes_X
    log_MX = Absorbing(schedule).posterior(probs_MV.log(), ids_M, t, s)
    assert log_MX.dtype == torch.float64
    can_be = (noised_VX > 0).any(0)  # where all is masked at t = 1, no token is seen then
    torch.testing.assert_close(log_MX.exp()[can_be], expected_MX[can_be], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(log_MX.exp().sum(1), torch.ones(size + 1, dtype=torch.float64))


def test_the_posterior_of_half_precision_is_in_fp64():
    log_MV = torch.log_softmax(torch.randn(2, 3, generator=generator()), -1).bfloat16()
    ours = Absorbing().posterior(log_MV, torch.tensor([3, 1]), 0.9, 0.4)
    torch.testing.assert_close(ours, Absorbing().posterior(log_MV.double(), torch.tensor([3, 1]), 0.9, 0.4))


def test_two_steps_of_the_posterior_are_one():
    process, size = Absorbing(Cosine()), 4
    log_V = torch.log_softmax(torch.randn(1, size, generator=generator(), dtype=torch.float64), -1)
    mask = torch.tensor([size])
    first, second = process.posterior(log_V, mask, 0.9, 0.6).exp(), process.posterior(log_V, mask, 0.6, 0.2).exp()
    together = first[:, -1:] * second + torch.cat([first[:, :-1], torch.zeros(1, 1)], 1)
    torch.testing.assert_close(together, process.posterior(log_V, mask, 0.9, 0.2).exp())
