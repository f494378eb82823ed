"""Noise schedules: derivative, inverse and weight agree with α."""

import pytest
import torch

from multidiff.processes import Cosine, LogLinear


@pytest.mark.parametrize("schedule", [LogLinear(), LogLinear(0.0), Cosine(), Cosine(0.1)])
def test_schedules_are_consistent(schedule):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(schedule.derivative(t), slope)
    torch.testing.assert_close(schedule.inverse(alpha), t)
    assert bool((slope < 0).all())
    torch.testing.assert_close(schedule.weight(t), -slope / (1 - alpha))
    assert float(schedule.alpha(torch.tensor(0.0))) == 1.0


def test_log_linear_weight_is_exactly_one_over_t():
    t = torch.tensor([1e-3, 0.3, 1.0], dtype=torch.float64)
    assert torch.equal(LogLinear().weight(t), 1 / t)
