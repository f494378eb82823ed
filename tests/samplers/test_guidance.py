"""Guidance and its schedules."""

import torch

from multidiff.samplers.guidance import Guidance, guide


def test_guidance():
    conditional = torch.tensor([[0.0, 1.0, -torch.inf]])
    unconditional = torch.tensor([[0.5, 0.5, -torch.inf]])
    assert guide(conditional, [(unconditional, 1.0)]).tolist() == conditional.tolist()
    assert guide(conditional, [(unconditional, 3.0)]).tolist() == [[-1.0, 2.0, -torch.inf]]
    assert guide(conditional, [(unconditional, 3.0), (torch.zeros(1, 3), 2.0)]).tolist() == [[-1.0, 3.0, -torch.inf]]
    steps_R = torch.tensor([3, 1, 5])
    linear, interval = Guidance(3.0, "linear"), Guidance(3.0, [0.25, 0.5])
    assert [linear.scale_at(3.0, k, steps_R).tolist() for k in range(3)] == [[1, 3, 1], [2, 3, 1.5], [3, 3, 2]]
    assert [interval.scale_at(3.0, k, torch.tensor([4])).tolist() for k in range(4)] == [[1], [3], [3], [1]]
    assert Guidance().scale_at(3.0, 0, steps_R).tolist() == [3, 3, 3]
