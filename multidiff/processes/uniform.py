"""Uniform noise: tokens become any token of their span (Schiff et al. 2024, UDLM, arXiv 2412.10193)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multidiff.processes.interpolating import Interpolating, Shares


@dataclass(frozen=True)
class Uniform(Interpolating):
    """Each token is drawn again from its span with probability 1 - α(t), on its own.

    No token says that it is noise, so the loss is at all of them, and a sampler may change each one at every step. The
    model needs the time to know how much to trust what it sees: set `time_input: true` of the transformer.

    Attributes:
        schedule: α.
    """

    @property
    def starts_masked(self) -> bool:
        return False

    def shares(self, t: Tensor) -> Shares:
        noise = self.schedule.noise(t)
        return Shares(self.schedule.alpha(t), noise, torch.zeros_like(noise))

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """w_code = -α' / (1 - α)."""
        weight = self.schedule.weight(t)
        return torch.zeros_like(weight), weight
