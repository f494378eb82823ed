"""What a forward process must offer, whatever noise it uses.

Shape suffixes: P tokens, S spans of the vocabulary, M some tokens, N those of one span, V local ids of a span,
X = V + 1 of these and `<mask>`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Draw = Callable[[], Tensor]


@dataclass(frozen=True)
class CorruptedTokens:
    """What a forward process made of tokens.

    Attributes:
        ids_P: int64, the noised shared ids.
        predicted_P: bool, where the loss is.
        weight_P: float64, the weight of the divergence in the bound there; 0 elsewhere.
    """

    ids_P: Tensor
    predicted_P: Tensor
    weight_P: Tensor


class Process(ABC):  # jsonargparse cannot build a default for a typing.Protocol
    """A forward process on codes: q(x_t | x_0), factorised over tokens. Times are in [0, 1], from clean to noised.

    The bound on the negative log-likelihood of a passage in continuous time is

        E_t E_{x_t}  Σ_i  w(x_t,i, t) D(x_0,i, x_t,i, p_i, t)

    with a weight w and a divergence D that the process defines. p_i is what the model says of x_0,i.
    """

    @property
    @abstractmethod
    def starts_masked(self) -> bool:
        """Whether fully noised tokens are all `<mask>`, as samplers that unmask need it."""

    @abstractmethod
    def noise(self, t: Tensor) -> Tensor:
        """How much noise there is at t, from 0 to 1: the time that a model with `time_input` sees, the same for every
        schedule."""

    @abstractmethod
    def time(self, noise: Tensor) -> Tensor:
        """The t at which there is this much noise, the inverse of `noise`."""

    @abstractmethod
    def corrupt(self, ids_P: Tensor, span_P: Tensor, spans_S2: Tensor, t_P: Tensor, draw: Draw) -> CorruptedTokens:
        """Draw x_t.

        Args:
            ids_P: int64, clean shared ids.
            span_P: int64, index of the span of each token; negative at structure, which stays as it is.
            spans_S2: int64, the first shared id of each span and the one behind its last.
            t_P: float64, the time of each token. 0 leaves a token as it is.
            draw: draws float64 [P] in [0, 1), new ones at each call. Tokens need numbers of their own wherever they
                stand in a batch, which the caller knows how to give.
        """

    @abstractmethod
    def divergence(self, logits_NV: Tensor, target_N: Tensor, noised_N: Tensor, t_N: Tensor) -> Tensor:
        """D of each token, in nats, [N]. It is 0 where the model is certain of the token.

        Args:
            logits_NV: of the model, over the ids of one span, at least in fp32.
            target_N: local ids of x_0.
            noised_N: local ids of x_t; V stands for `<mask>`.
            t_N: times.
        """

    def loss(self, noised_N: Tensor, t_N: Tensor, logits_NV: Tensor, target_N: Tensor, place_N: Tensor) -> Tensor:
        """`divergence` with tables of a whole batch, of which the logits have the rows `place_N`."""
        return self.divergence(logits_NV, target_N, noised_N[place_N], t_N[place_N])

    @abstractmethod
    def prior(self, sizes_M: Tensor, uniform_M: Tensor) -> Tensor:
        """Fully noised tokens, int64 local ids [M], of spans of these sizes; the size stands for `<mask>`."""

    @abstractmethod
    def posterior(
        self, log_probs_MV: Tensor, ids_M: Tensor, sizes_M: Tensor, t: Tensor | float, s: Tensor | float
    ) -> Tensor:
        """The reverse step from t to s < t: log p(x_s | x_t), float64 [M, X].

        Args:
            log_probs_MV: the model's log-probabilities of x_0; -inf beyond a span.
            ids_M: local ids of x_t; V stands for `<mask>`.
            sizes_M: how many ids the span of each token has, at most V.
            t, s: times, one for all tokens or float64 [M]; 0 is clean.
        """
