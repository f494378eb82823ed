"""Forward processes that interpolate between data and noise, in general.

A token keeps its value with probability α, becomes a uniform one of the V ids of its span with probability u, and
`<mask>` with probability m:

    q_t(z | x) = α [z = x] + u/V [z ≠ mask] + m [z = mask],        α + u + m = 1.

Where α falls from 1 to 0, and m and u/V divided by α rise, this is a Markov chain whose reversal is known (von Rütte et
al. 2025, GIDD, arXiv 2503.04482; Schiff et al. 2024, UDLM, arXiv 2412.10193, for uniform noise alone). p is what the
model says of x given all *other* tokens, and q_t(z | p) = Σ_x p(x) q_t(z | x). The bound in continuous time is

    E_t E_z  Σ_i  a(z) / q_t(z | x)  (KL(q_t(· | x) ‖ q_t(· | p)) + IS(q_t(z | x) ‖ q_t(z | p)))

with IS(q ‖ p) = q/p - log(q/p) - 1, and a(z) = c' - (α'/α) c of the noise c(z) = u/V or m: the rate at which tokens
become z. The factor of the bracket is split into a weight, which depends on t and on whether z is `<mask>`,

    w_mask = α a(mask) / m,        w_code = α a(code) V / u,

and the rest, which makes the divergence. For `<mask>` alone that is the cross-entropy.

Shape suffixes: P tokens, S spans, M some tokens, N those of one span, V local ids of a span, X = V + 1 of these and
`<mask>`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from multidiff.processes.process import CorruptedTokens, Draw, Process
from multidiff.processes.schedules import LogLinear, Schedule
from multidiff.sequence.vocabulary import MASK

_SMALLEST = 1e-6  # of α V / u: below it, nothing is left to learn from
_LEAST = 1e-12  # of a share, so that fp32 can divide by it


class Shares(NamedTuple):
    """How likely a token is to be clean (α), uniform (u) and `<mask>` (m)."""

    clean: Tensor
    uniform: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Interpolating(Process):
    """A process that is given by its shares and weights at time t.

    Attributes:
        schedule: α, which decides how fast noise comes.

    Raises:
        ValueError: a schedule that does not run from clean to noised.
    """

    schedule: Schedule = field(default_factory=LogLinear)

    def __post_init__(self) -> None:
        self.schedule.check()

    @abstractmethod
    def shares(self, t: Tensor) -> Shares:
        """α, u and m at t."""

    @abstractmethod
    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """w_mask and w_code at t > 0."""

    def noise(self, t: Tensor) -> Tensor:
        """1 - α(t) of the schedule."""
        return self.schedule.noise(t)

    def time(self, noise: Tensor) -> Tensor:
        """α⁻¹(1 - noise)."""
        return self.schedule.inverse(1 - noise)

    def corrupt(self, ids_P: Tensor, span_P: Tensor, spans_S2: Tensor, t_P: Tensor, draw: Draw) -> CorruptedTokens:
        """Noise tokens, each on its own, where t > 0. The loss is at all of these."""
        predicted_P = (span_P >= 0) & (t_P > 0)
        t_P = t_P.where(predicted_P, 1.0)
        clean_P, uniform_P, _ = self.shares(t_P)
        start_P, stop_P = spans_S2[span_P.clamp_min(0)].unbind(1)
        kind_P, place_P = draw(), draw()
        code_P = start_P + (place_P * (stop_P - start_P)).long()
        noised_P = torch.where(kind_P < clean_P, ids_P, torch.where(kind_P < clean_P + uniform_P, code_P, MASK))
        noised_P = noised_P.where(predicted_P, ids_P)
        mask_P, other_P = self.weights(t_P)
        weight_P = torch.where(noised_P == MASK, mask_P, other_P).where(predicted_P, 0.0)
        return CorruptedTokens(noised_P, predicted_P, weight_P)

    def divergence(self, logits_NV: Tensor, target_N: Tensor, noised_N: Tensor, t_N: Tensor) -> Tensor:
        """(KL + IS) / α at `<mask>` and at a wrong token; at a right one that times u/V / q_t(x | x)."""
        size = logits_NV.shape[1]
        clean_N, uniform_N, _ = (share.to(logits_NV).clamp_min(_LEAST) for share in self.shares(t_N))
        ratio_N = (clean_N * size / uniform_N).clamp_min(_SMALLEST)  # of what is clean to each uniform token
        clean_N = ratio_N * uniform_N / size
        # In units of u/V, q_t(v | p) is 1 + ratio p(v), and its logarithm vanishes with the ratio.
        p_NV = torch.softmax(logits_NV, -1)
        log_NV = torch.log1p(ratio_N[:, None] * p_NV)
        target_N1, noised_N1 = target_N[:, None], noised_N.clamp_max(size - 1)[:, None]
        log_target_N, log_certain_N = log_NV.gather(1, target_N1)[:, 0], torch.log1p(ratio_N)
        kl_N = (1 + ratio_N) * (log_certain_N - log_target_N) - (log_NV.sum(1) - log_target_N)
        right_N, code_N = noised_N == target_N, noised_N < size
        p_N, log_N = p_NV.gather(1, noised_N1)[:, 0], log_NV.gather(1, noised_N1)[:, 0]
        excess_N = ratio_N * (right_N.to(p_N) - p_N) / (1 + ratio_N * p_N)  # q_t(z | x) / q_t(z | p) - 1
        saito_N = excess_N - log_certain_N * right_N + log_N
        divergence_N = kl_N / ratio_N + torch.where(code_N, saito_N / clean_N, 0.0)
        return torch.where(right_N, divergence_N / (1 + ratio_N), divergence_N)

    def prior(self, sizes_M: Tensor, uniform_M: Tensor) -> Tensor:
        """What the process ends in: `<mask>` if m > 0 there, else uniform tokens."""
        return sizes_M if self.starts_masked else (uniform_M * sizes_M).long()

    def posterior(
        self, log_probs_MV: Tensor, ids_M: Tensor, sizes_M: Tensor, t: Tensor | float, s: Tensor | float
    ) -> Tensor:
        """q(x_t | x_s) q_s(x_s | p) / q_t(x_t | p), the reverse step where p does not see x_t itself. It makes no
        difference whether it does where the noise is `<mask>` alone."""
        count, size = log_probs_MV.shape
        (clean_t, uniform_t, mask_t), (clean_s, uniform_s, mask_s) = (self._shares_at(at, ids_M) for at in (t, s))
        kept = clean_t / clean_s
        each_M1, ids_M1 = 1 / sizes_M[:, None].double(), ids_M[:, None]
        # q(x_t | x_s) at every x_s: what arrives at x_t from anywhere, and more from x_t itself.
        of_code, of_mask = (uniform_t - kept * uniform_s).clamp_min(0), (mask_t - kept * mask_s).clamp_min(0)
        arrives_M1 = torch.where(ids_M1 < size, of_code * each_M1, of_mask)
        there_MV = torch.arange(size, device=ids_M.device) < sizes_M[:, None]
        before_MV = clean_s * log_probs_MV.double().exp() + uniform_s * each_M1 * there_MV
        before_MX = torch.cat([before_MV, mask_s.expand(count, 1)], 1)
        joint_MX = (arrives_M1 * before_MX).scatter_add_(1, ids_M1, kept * before_MX.gather(1, ids_M1))
        # A model may rule out a token that cannot change any more. The limit of the step then keeps it.
        joint_MX.scatter_add_(1, ids_M1, (joint_MX.sum(1, keepdim=True) == 0).double())
        return (joint_MX / joint_MX.sum(1, keepdim=True)).log()

    def _shares_at(self, t: Tensor | float, ids_M: Tensor) -> Shares:
        """The shares at times, [M, 1] or [1, 1]; 0 is clean, whatever a schedule leaves of noise there."""
        t_M1 = torch.as_tensor(t, dtype=torch.float64, device=ids_M.device).view(-1, 1)
        clean, uniform, mask = self.shares(t_M1.where(t_M1 > 0, 1.0))
        return Shares(clean.where(t_M1 > 0, 1.0), uniform.where(t_M1 > 0, 0.0), mask.where(t_M1 > 0, 0.0))
