"""Noise schedules: α(t), the probability that a token is still clean at time t in [0, 1].

α falls from 1 to (almost) 0. A schedule is an object with α, its derivative and its inverse; the weight of the
continuous-time bound follows from them, w(t) = -α'(t) / (1 - α(t)) (Sahoo et al. 2024, arXiv 2406.07524, eq. 10).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Schedule(ABC):
    """A differentiable, strictly falling α on [0, 1]."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a token is clean at t."""

    @abstractmethod
    def derivative(self, t: Tensor) -> Tensor:
        """dα/dt, negative."""

    @abstractmethod
    def inverse(self, alpha: Tensor) -> Tensor:
        """The t at which α(t) = alpha."""

    def weight(self, t: Tensor) -> Tensor:
        """Weight of the cross-entropy at masked positions in the bound, for t > 0."""
        return -self.derivative(t) / (1 - self.alpha(t))


@dataclass(frozen=True)
class LogLinear(Schedule):
    """α(t) = 1 - (1 - ε) t, so the weight is exactly 1/t (MDLM, LLaDA).

    Attributes:
        epsilon: share that stays clean at t = 1.

    Examples:
        >>> half = torch.tensor(0.5)
        >>> LogLinear(epsilon=0.0).alpha(half).item(), LogLinear().weight(half).item()
        (0.5, 2.0)
    """

    epsilon: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.epsilon) * t

    def derivative(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.epsilon - 1)

    def inverse(self, alpha: Tensor) -> Tensor:
        return (1 - alpha) / (1 - self.epsilon)

    def weight(self, t: Tensor) -> Tensor:
        return 1 / t  # the general form, with the rounding of 1 - α gone


@dataclass(frozen=True)
class Cosine(Schedule):
    """1 - α(t) = (1 - ε) cos(π/2 (1 - t)): the masking ratios of MaskGIT (Chang et al. 2022, section 3.3).

    Attributes:
        epsilon: share that stays clean at t = 1.
    """

    epsilon: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.epsilon) * torch.sin(math.pi / 2 * t)

    def derivative(self, t: Tensor) -> Tensor:
        return -(1 - self.epsilon) * math.pi / 2 * torch.cos(math.pi / 2 * t)

    def inverse(self, alpha: Tensor) -> Tensor:
        return 2 / math.pi * torch.arcsin((1 - alpha) / (1 - self.epsilon))
