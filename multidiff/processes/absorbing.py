"""Absorbing noise: tokens become `<mask>` (Austin et al. 2021, D3PM, arXiv 2107.03006, section 3.1).

Shape suffixes: P tokens, S spans, N tokens of one span, V local ids of a span.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multidiff.processes.interpolating import Interpolating, Shares
from multidiff.processes.process import CorruptedTokens, Draw
from multidiff.sequence.vocabulary import MASK


@dataclass(frozen=True)
class Absorbing(Interpolating):
    """Each token is masked with probability 1 - α(t), on its own. The loss is at the masked tokens.

    The bound on the negative log-likelihood of a passage in continuous time is (Sahoo et al. 2024, MDLM,
    arXiv 2406.07524, eq. 10)

        E_t  w(t)  Σ_{i masked} -log p(x_i | x_t),        w(t) = -α'(t) / (1 - α(t)).

    Attributes:
        schedule: α. The log-linear one has w(t) = 1/t.
    """

    @property
    def starts_masked(self) -> bool:
        return True

    def shares(self, t: Tensor) -> Shares:
        noise = self.schedule.noise(t)
        return Shares(self.schedule.alpha(t), torch.zeros_like(noise), noise)

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.schedule.weight(t)
        return weight, torch.zeros_like(weight)

    def corrupt(self, ids_P: Tensor, span_P: Tensor, spans_S2: Tensor, t_P: Tensor, draw: Draw) -> CorruptedTokens:
        """Mask tokens with probability 1 - α(t), where t > 0. The loss is at these."""
        noised_P = (span_P >= 0) & (t_P > 0)
        t_P = t_P.where(noised_P, 1.0)
        masked_P = noised_P & (draw() < self.schedule.noise(t_P))
        return CorruptedTokens(
            torch.where(masked_P, MASK, ids_P), masked_P, self.schedule.weight(t_P).where(masked_P, 0.0)
        )

    def divergence(self, logits_NV: Tensor, target_N: Tensor, noised_N: Tensor, t_N: Tensor) -> Tensor:
        """The cross-entropy -log p(x)."""
        return torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none")
