"""Order: a score for each undecided position; the highest are decided first, ties by position.

Shape suffix: M positions.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from multidiff.samplers.choice import Choice


def random(choice: Choice, uniform_M: Tensor, noise_M: Tensor) -> Tensor:
    """Any order is as likely as any other. One position a step, it samples the model's any-order distribution."""
    return uniform_M


def confidence(choice: Choice, uniform_M: Tensor, noise_M: Tensor) -> Tensor:
    """log p of the drawn token, plus the noise times a Gumbel variable (Chang et al. 2022, MaskGIT)."""
    gumbel_M = -(-uniform_M.clamp_min(1e-300).log()).log()
    return choice.log_p_M + noise_M * gumbel_M


ORDERS: dict[str, Callable[[Choice, Tensor, Tensor], Tensor]] = {"random": random, "confidence": confidence}
