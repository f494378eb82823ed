"""What a forward process must offer, whatever noise it uses.

Shape suffixes: P tokens, M some of them, V local ids of a span, X = V + 1 of these and `<mask>`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Uniform = Callable[[], Tensor]


@dataclass(frozen=True)
class CorruptedTokens:
    """What a forward process made of tokens.

    Attributes:
        ids_P: int64, the noised shared ids.
        predicted_P: bool, where the loss is.
    """

    ids_P: Tensor
    predicted_P: Tensor


class Process(ABC):  # jsonargparse cannot build a default for a typing.Protocol
    """A forward process on codes: q(x_t | x_0), factorised over tokens. Times are in [0, 1], from clean to noised."""

    @abstractmethod
    def corrupt(self, ids_P: Tensor, span_P: Tensor, t_P: Tensor, uniform: Uniform) -> CorruptedTokens:
        """Draw x_t.

        Args:
            ids_P: int64, clean shared ids.
            span_P: int64, index of the span of each token; negative at structure, which stays as it is.
            t_P: float64, the time of each token. 0 leaves a token as it is; 1 draws it
                from the prior, up to the ε of a schedule.
            uniform: returns fresh uniform numbers in [0, 1), float64 [P], at each call.
        """

    @abstractmethod
    def prior(self, ids_P: Tensor, span_P: Tensor, uniform: Uniform) -> Tensor:
        """Fully noised tokens: ids_P with every token outside of structure drawn from q(x_1)."""

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """Weight w(t) of the cross-entropy where the loss is, in the bound on the negative log-likelihood; t > 0."""

    @abstractmethod
    def posterior(self, log_probs_MV: Tensor, ids_M: Tensor, t: float, s: float) -> Tensor:
        """The reverse step from t to s < t, log q(x_s | x_t, x_0) averaged over the model's x_0, [M, X].

        Args:
            log_probs_MV: the model's log-probabilities of x_0.
            ids_M: local ids of x_t; V stands for `<mask>`.
        """
