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

_ENDS = 0.1  # how far α may be from 1 at time 0 and from 0 at time 1


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

    def noise(self, t: Tensor) -> Tensor:
        """1 - α(t). Where α is near 1, a schedule's own formula keeps the digits that the difference loses."""
        return 1 - self.alpha(t)

    def check(self) -> None:
        """Refuse a schedule that cannot train a model.

        Raises:
            ValueError: α is not within 0.1 of 1 at t = 0 and of 0 at t = 1, leaves [0, 1], or rises somewhere.
        """
        alpha = self.alpha(torch.linspace(0, 1, 101, dtype=torch.float64))
        first, last = alpha[0].item(), alpha[-1].item()
        inside = bool(((alpha >= 0) & (alpha <= 1)).all())
        if not (inside and first > 1 - _ENDS and last < _ENDS and bool((alpha.diff() <= 0).all())):
            raise ValueError(
                f"The schedule {self} does not run from clean to noised: α is {first:.3g} at time 0 and {last:.3g} at "
                "time 1. It must fall from 1 to 0; set its parameters so that it does."
            )

    def weight(self, t: Tensor) -> Tensor:
        """Weight of the cross-entropy at masked positions in the bound, for t > 0."""
        return -self.derivative(t) / self.noise(t)


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
        return 1 - self.noise(t)

    def noise(self, t: Tensor) -> Tensor:
        return (1 - self.epsilon) * t

    def derivative(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.epsilon - 1)

    def inverse(self, alpha: Tensor) -> Tensor:
        return (1 - alpha) / (1 - self.epsilon)

    def weight(self, t: Tensor) -> Tensor:
        return 1 / t  # the general form, with the rounding of 1 - α gone


@dataclass(frozen=True)
class Polynomial(Schedule):
    """1 - α(t) = (1 - ε) tⁿ, so the weight is exactly n/t (Shi et al. 2024, MD4, arXiv 2406.04329, table 4).

    Attributes:
        power: n > 0; 1 is log-linear, more leaves tokens clean for longer.
        epsilon: share that stays clean at t = 1.
    """

    power: float = 2.0
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise ValueError(f"The power of a polynomial schedule must be a number above 0, not {self.power!r}.")

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.noise(t)

    def noise(self, t: Tensor) -> Tensor:
        return (1 - self.epsilon) * t**self.power

    def derivative(self, t: Tensor) -> Tensor:
        return (self.epsilon - 1) * self.power * t ** (self.power - 1)

    def inverse(self, alpha: Tensor) -> Tensor:
        return ((1 - alpha) / (1 - self.epsilon)) ** (1 / self.power)

    def weight(self, t: Tensor) -> Tensor:
        return self.power / t


@dataclass(frozen=True)
class Cosine(Schedule):
    """1 - α(t) = (1 - ε) cos(π/2 (1 - t)): the masking ratios of MaskGIT (Chang et al. 2022, section 3.3).

    Attributes:
        epsilon: share that stays clean at t = 1.
    """

    epsilon: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.noise(t)

    def noise(self, t: Tensor) -> Tensor:
        return (1 - self.epsilon) * torch.sin(math.pi / 2 * t)

    def derivative(self, t: Tensor) -> Tensor:
        return -(1 - self.epsilon) * math.pi / 2 * torch.cos(math.pi / 2 * t)

    def inverse(self, alpha: Tensor) -> Tensor:
        return 2 / math.pi * torch.arcsin(((1 - alpha) / (1 - self.epsilon)).clamp(0, 1))


@dataclass(frozen=True)
class CosineSquared(Schedule):
    """1 - α(t) = (1 - ε) cos²(π/2 (1 - t)) (Sahoo et al. 2024, MDLM, appendix on noise schedules).

    Attributes:
        epsilon: share that stays clean at t = 1.
    """

    epsilon: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.noise(t)

    def noise(self, t: Tensor) -> Tensor:
        return (1 - self.epsilon) * torch.sin(math.pi / 2 * t) ** 2

    def derivative(self, t: Tensor) -> Tensor:
        return -(1 - self.epsilon) * math.pi / 2 * torch.sin(math.pi * t)

    def inverse(self, alpha: Tensor) -> Tensor:
        return 2 / math.pi * torch.arcsin(((1 - alpha) / (1 - self.epsilon)).clamp(0, 1).sqrt())

    def weight(self, t: Tensor) -> Tensor:
        return math.pi / torch.tan(math.pi / 2 * t)  # the general form, with the rounding of 1 - α gone


@dataclass(frozen=True)
class Geometric(Schedule):
    """α(t) = exp(-σ(t)), σ(t) = σ₀ (σ₁/σ₀)ᵗ (Lou et al. 2024, SEDD, arXiv 2310.16834, section 5.1).

    A share of 1 - exp(-σ₀) is noised at t = 0 already.

    Attributes:
        smallest: σ₀.
        largest: σ₁.
    """

    smallest: float = 1e-4
    largest: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.smallest < self.largest < math.inf:
            raise ValueError(
                f"A geometric schedule needs 0 < smallest < largest, not {self.smallest!r} and {self.largest!r}."
            )

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self._sigma(t))

    def noise(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._sigma(t))

    def derivative(self, t: Tensor) -> Tensor:
        sigma = self._sigma(t)
        return -self._growth * sigma * torch.exp(-sigma)

    def inverse(self, alpha: Tensor) -> Tensor:
        return torch.log(-torch.log(alpha) / self.smallest) / self._growth

    def weight(self, t: Tensor) -> Tensor:
        sigma = self._sigma(t)
        return self._growth * sigma / torch.expm1(sigma)  # the general form, with the rounding of 1 - α gone

    @property
    def _growth(self) -> float:
        return math.log(self.largest / self.smallest)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.smallest * torch.exp(self._growth * t)
