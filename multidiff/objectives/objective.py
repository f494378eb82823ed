"""The diffusion objective: forward processes, and how divergences become one training loss.

Shape suffixes: M positions of the loss, T tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from multidiff.objectives.times import SMALLEST
from multidiff.processes import Absorbing, Process
from multidiff.sequence.blocks import AttentionPattern
from multidiff.sequence.vocabulary import SharedVocabulary

_WEIGHT_LIMIT = 5.0
_ENDS = 0.02  # how far the noise at both ends of complementary times may be from 1
Weighting = Literal["elbo", "uniform", "clipped", "softmin"]
Normalisation = Literal["targets", "masked", "segments", "documents"]


@dataclass(frozen=True)
class Objective:
    """The forward process that the model learns to undo, and how much each token weighs in the loss.

    With a time t per segment the loss trains every conditional but bounds nothing joint. With one t shared by a
    document's targets, the weighting "elbo" and all times, it bounds their joint likelihood. What is logged as
    train/TOKENIZER always has the weight of the bound.

    Attributes:
        process: the forward process, as `multidiff.processes.Process`.
        processes: tokenizer name -> its own forward process, where it has one.
        weighting: the weight of a divergence (of a cross-entropy, if the noise is absorbing) at time t, for all
            tokenizers or by name ("elbo" where not named). "elbo": w(t) of the bound. "uniform": 1 (as MaskGIT and
            MUSE train). "clipped": min(w(t), γ), as min-SNR (Hang et al. 2023, arXiv 2303.09556). "softmin":
            γ w(t) / (γ + w(t)), its smooth form, as soft-min-SNR (Crowson et al. 2024, arXiv 2401.11605).
        weight_limit: γ, of "clipped" and "softmin"; None is 5.
        normalisation: divide by "targets", all target tokens (as LLaDA does), or by "masked", those with a loss; or
            take the mean over the targets of a segment and then over "segments", or over the targets of a document and
            then over "documents". All are over a whole optimizer step.
        loss_weights: tokenizer name -> what a token of it counts, in the sum and in what that is divided by; 1 where
            not named. A caption has few tokens beside a picture's: more than 1 keeps it from drowning.
        times: the range that times are drawn from, uniformly. A narrower one leaves out noise that is too little or too
            much to learn from (Arriola et al. 2025, BD3-LM, arXiv 2503.09573, section 4), and the loss bounds nothing.
        label_smoothing: ε, the share of the target that is spread over all ids of the span (Szegedy et al. 2016, arXiv
            1512.00567, section 7), where noise is absorbing. What is logged has none.
        complementary: train each document twice in its batch, the second time with masks where the first has none, at
            the time with 1 - the noise, where noise is absorbing. Every code of a target is then predicted once (Wu et
            al. 2025, Fast-dLLM v2, arXiv 2509.26328, section 3). A batch takes twice the tokens.

    Raises:
        ValueError: a value outside of these.
    """

    process: Process = field(default_factory=Absorbing)
    processes: dict[str, Process] = field(default_factory=dict)
    weighting: Weighting | dict[str, Weighting] = "elbo"
    weight_limit: float | None = None
    normalisation: Normalisation = "targets"
    loss_weights: dict[str, float] = field(default_factory=dict)
    times: tuple[float, float] = (SMALLEST, 1.0)
    label_smoothing: float = 0.0
    complementary: bool = False

    def __post_init__(self) -> None:
        for name, value in self.loss_weights.items():
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"The objective's loss weight of {name!r} must be a number above 0, not {value!r}.")
        known = get_args(Weighting)
        weightings = self.weighting.values() if isinstance(self.weighting, Mapping) else [self.weighting]
        for value in weightings:
            if value not in known:
                raise ValueError(f"The objective's weighting must be {' or '.join(known)}, not {value!r}.")
        if self.weight_limit is not None:
            if not isinstance(self.weight_limit, int | float) or not 0 < self.weight_limit < math.inf:
                raise ValueError(f"The objective's weight_limit must be a number above 0, not {self.weight_limit!r}.")
            if not {"clipped", "softmin"} & set(weightings):
                raise ValueError(
                    f"The objective's weight_limit {self.weight_limit} goes with the weighting clipped or softmin."
                )
        known = get_args(Normalisation)
        if self.normalisation not in known:
            raise ValueError(f"The objective's normalisation must be {' or '.join(known)}, not {self.normalisation!r}.")
        if not isinstance(self.label_smoothing, int | float) or not 0 <= self.label_smoothing < 1:
            raise ValueError(f"The objective's label_smoothing must be in [0, 1), not {self.label_smoothing!r}.")
        low, high = self.times
        if not SMALLEST <= low < high <= 1:
            raise ValueError(f"The objective's times must be a range within [{SMALLEST}, 1], not {list(self.times)}.")

    def check(self, vocabulary: SharedVocabulary) -> None:
        """Refuse settings of tokenizers that do not exist, and what their processes do not allow.

        Raises:
            ValueError: it names the tokenizer.
        """
        weighted = self.weighting if isinstance(self.weighting, Mapping) else {}
        for name in (*self.loss_weights, *self.processes, *weighted):
            vocabulary.layout(name)
        for name, process in self.processes_of(vocabulary).items():
            if self.label_smoothing and type(process) is not Absorbing:
                raise ValueError(
                    f"label_smoothing {self.label_smoothing} goes with absorbing noise, whose loss is a cross-entropy, "
                    f"but {name!r} has {type(process).__name__}."
                )
            if self.complementary and type(process) is not Absorbing:
                raise ValueError(
                    f"complementary goes with absorbing noise, which predicts a part of the tokens, but {name!r} has "
                    f"{type(process).__name__}."
                )
            both = float(process.noise(torch.tensor(self.times, dtype=torch.float64)).sum())
            if self.complementary and abs(both - 1) > _ENDS:
                raise ValueError(
                    f"complementary needs a range of times whose noise at both ends adds up to 1, but that of {name!r} "
                    f"at {list(self.times)} adds up to {both:.3g}."
                )

    def check_pattern(self, pattern: AttentionPattern, vocabulary: SharedVocabulary) -> None:
        """Refuse what does not fit the attention of a model.

        Autoregressive training adds no noise, and every code weighs the same but for `loss_weights`. Blocks
        are generated by samplers that unmask.

        Raises:
            ValueError: it names the setting.
        """
        if pattern.is_full:
            return
        if not pattern.is_autoregressive:
            for name, process in self.processes_of(vocabulary).items():
                if not process.starts_masked:
                    kind = type(process).__name__
                    raise ValueError(f"A model of {pattern} begins with masks, but {name!r} has {kind} noise.")
            return
        usual = type(self)()
        for setting in fields(self):
            value, kept = getattr(self, setting.name), ("loss_weights", "normalisation", "label_smoothing")
            same = value == getattr(usual, setting.name) or (setting.name, value) == ("weighting", "uniform")
            if setting.name not in kept and not same:
                raise ValueError(
                    f"The objective's {setting.name} has no meaning for a model with causal attention, which trains on "
                    "clean tokens. Remove it from the objective."
                )

    def process_of(self, name: str) -> Process:
        """The forward process of a tokenizer."""
        return self.processes.get(name, self.process)

    def processes_of(self, vocabulary: SharedVocabulary) -> dict[str, Process]:
        """The forward process of each tokenizer by name."""
        return {name: self.process_of(name) for name in vocabulary.tokenizers}

    def token_weights(self, vocabulary: SharedVocabulary) -> Tensor:
        """float64 [T]: what a token of each tokenizer counts."""
        return torch.tensor([self.loss_weights.get(name, 1.0) for name in vocabulary.tokenizers], dtype=torch.float64)

    def weights(self, bound_M: Tensor, tokenizer_M: Tensor, vocabulary: SharedVocabulary) -> Tensor:
        """The weight of each divergence, without what a token of its tokenizer counts.

        Args:
            bound_M: its weight in the bound.
            tokenizer_M: the place of its tokenizer in the vocabulary.
        """
        if not isinstance(self.weighting, Mapping):
            return self._weighted(self.weighting, bound_M)
        weights_M = bound_M
        for place, name in enumerate(vocabulary.tokenizers):
            if (weighting := self.weighting.get(name, "elbo")) != "elbo":
                weights_M = torch.where(tokenizer_M == place, self._weighted(weighting, bound_M), weights_M)
        return weights_M

    def _weighted(self, weighting: Weighting, bound_M: Tensor) -> Tensor:
        if weighting == "uniform":
            return torch.ones_like(bound_M)
        limit = _WEIGHT_LIMIT if self.weight_limit is None else self.weight_limit
        if weighting == "clipped":
            return bound_M.clamp_max(limit)
        if weighting == "softmin":
            return limit * bound_M / (limit + bound_M)
        return bound_M
