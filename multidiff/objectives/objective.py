"""The diffusion objective: a forward process, and how cross-entropies become one training loss.

Shape suffixes: M positions of the loss, T tokenizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from multidiff.processes import Absorbing, Process
from multidiff.sequence.vocabulary import SharedVocabulary


@dataclass(frozen=True)
class Objective:
    """The forward process that the model learns to undo, and how much each token weighs in the loss.

    With a time t per segment the loss trains every conditional but bounds nothing joint. With one t shared by a
    document's targets and the weighting "elbo" it bounds their joint likelihood.

    Attributes:
        process: the forward process, as `multidiff.processes.Process`.
        weighting: "elbo", the weight w(t) of the bound; "none", 1 for every cross-entropy (as MaskGIT and MUSE train).
        normalisation: divide by "targets", all target tokens (as LLaDA does), or by "masked", those with a loss.
        loss_weights: tokenizer name -> what a token of it counts, in the sum and in what that is divided by; 1 where
            not named. A caption has few tokens beside a picture's: more than 1 keeps it from drowning.
    """

    process: Process = field(default_factory=Absorbing)
    weighting: Literal["elbo", "none"] = "elbo"
    normalisation: Literal["targets", "masked"] = "targets"
    loss_weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.loss_weights.items():
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"The objective's loss weight of {name!r} must be a number above 0, not {value!r}.")
        if self.weighting not in ("elbo", "none"):
            raise ValueError(f"The objective's weighting must be elbo or none, not {self.weighting!r}.")
        if self.normalisation not in ("targets", "masked"):
            raise ValueError(f"The objective's normalisation must be targets or masked, not {self.normalisation!r}.")

    def weights(self, vocabulary: SharedVocabulary) -> Tensor:
        """float64 [T]: what a token of each tokenizer counts."""
        return torch.tensor([self.loss_weights.get(name, 1.0) for name in vocabulary.tokenizers], dtype=torch.float64)
