"""Noise schedules: derivative, inverse and weight agree with α, and the bound of each is the entropy."""

import math

import pytest
import torch

from multidiff.processes import Absorbing, Cosine, CosineSquared, Geometric, LogLinear, Polynomial, Schedule

SCHEDULES = [
    *(LogLinear(), LogLinear(0.0), Cosine(), Cosine(0.05), CosineSquared(), CosineSquared(0.0)),
    *(Polynomial(), Polynomial(0.5), Polynomial(3.0, 0.0), Geometric(), Geometric(1e-5, 30.0)),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules_are_consistent(schedule):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(schedule.derivative(t), slope)
    torch.testing.assert_close(schedule.inverse(alpha), t, rtol=1e-6, atol=1e-9)
    assert bool((slope < 0).all())
    torch.testing.assert_close(schedule.weight(t), -slope / (1 - alpha))
    schedule.check()
    clean = 1.0 if not isinstance(schedule, Geometric) else math.exp(-schedule.smallest)
    assert float(schedule.alpha(torch.tensor(0.0, dtype=torch.float64))) == pytest.approx(clean, abs=1e-15)


def test_weights_are_exact_where_they_have_a_closed_form():
    t = torch.tensor([1e-3, 0.3, 1.0], dtype=torch.float64)
    assert torch.equal(LogLinear().weight(t), 1 / t)
    assert torch.equal(Polynomial(3.0).weight(t), 3 / t)


class Rising(Schedule):
    def alpha(self, t):
        return 1 - t + torch.sin(12 * t) * t * (1 - t)

    derivative = inverse = alpha  # unused


def test_a_schedule_runs_from_clean_to_noised():
    with pytest.raises(ValueError, match=r"does not run from clean to noised: α is 1 at time 0 and 0.5 at time 1"):
        Absorbing(LogLinear(0.5))
    with pytest.raises(ValueError, match=r"α is 0.368 at time 0"):
        Absorbing(Geometric(1.0, 20.0))
    with pytest.raises(ValueError, match="does not run from clean to noised"):
        Absorbing(Rising())
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="power of a polynomial schedule must be a number above 0"):
            Polynomial(bad)
    for smallest, largest in ((0.0, 1.0), (2.0, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="needs 0 < smallest < largest"):
            Geometric(smallest, largest)
