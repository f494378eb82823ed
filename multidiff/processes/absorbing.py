"""Absorbing noise: tokens become `<mask>` (Austin et al. 2021, D3PM, arXiv 2107.03006, section 3.1).

Shape suffixes: P tokens, M some of them, V local ids of a span, X = V + 1 of these and `<mask>`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from multidiff.processes.process import CorruptedTokens, Process, Uniform
from multidiff.processes.schedules import LogLinear, Schedule
from multidiff.sequence.vocabulary import MASK


@dataclass(frozen=True)
class Absorbing(Process):
    """Each token is masked with probability 1 - α(t), on its own. The loss is at the masked tokens.

    The bound on the negative log-likelihood of a passage in continuous time is (Sahoo et al. 2024, MDLM,
    arXiv 2406.07524, eq. 10)

        E_t  w(t)  Σ_{i masked} -log p(x_i | x_t),        w(t) = -α'(t) / (1 - α(t)).

    Attributes:
        schedule: α. The log-linear one has w(t) = 1/t.
    """

    schedule: Schedule = field(default_factory=LogLinear)

    def __post_init__(self) -> None:
        self.schedule.check()

    def corrupt(self, ids_P: Tensor, span_P: Tensor, t_P: Tensor, uniform: Uniform) -> CorruptedTokens:
        """Mask tokens with probability 1 - α(t), where t > 0."""
        probability_P = torch.where((span_P >= 0) & (t_P > 0), 1 - self.schedule.alpha(t_P), 0.0)
        masked_P = uniform() < probability_P
        return CorruptedTokens(torch.where(masked_P, MASK, ids_P), masked_P)

    def prior(self, ids_P: Tensor, span_P: Tensor, uniform: Uniform) -> Tensor:
        """`<mask>` everywhere outside of structure."""
        return torch.where(span_P >= 0, MASK, ids_P)

    def weight(self, t: Tensor) -> Tensor:
        """w(t) = -α'(t) / (1 - α(t))."""
        return self.schedule.weight(t)

    def posterior(self, log_probs_MV: Tensor, ids_M: Tensor, t: float, s: float) -> Tensor:
        """A masked token stays masked with probability (1 - α_s) / (1 - α_t) and else becomes x_0 with the model's
        probability; a token that is not masked stays (Sahoo et al. 2024, eq. 6)."""
        alpha_t, alpha_s = self.schedule.alpha(torch.tensor([t, s], dtype=torch.float64)).tolist()
        count, size = log_probs_MV.shape
        stays_M1 = log_probs_MV.new_full((count, 1), (1 - alpha_s) / (1 - alpha_t), dtype=torch.float64)
        masked_MX = torch.cat([log_probs_MV.double() + (1 - stays_M1).log(), stays_M1.log()], 1)
        kept_MX = torch.nn.functional.one_hot(ids_M, size + 1).double().log()
        return torch.where((ids_M == size)[:, None], masked_MX, kept_MX)
