"""Remasking: whether decided positions are masked again, or replaced, and how the reverse process unmasks.

From α_t to α_s ≥ α_t, a decided position is masked again with probability σ ≤ σ_max = min(1, (1 - α_s)/α_t), and a
masked position is decided with probability (α_s - (1 - σ) α_t)/(1 - α_t) (Wang et al. 2025, ReMDM, arXiv 2503.00307).
Together these keep each position's share of masks at 1 - α. For "conf", whose σ is 0 at masked positions, this holds
only approximately. Without remasking, σ = 0, and this is the ancestral sampler of MDLM.

None of it depends on the logits, so what a step unmasks and masks again is known before the model is asked.

Shape suffixes: R rows, N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multidiff.samplers.checks import LARGEST, check_choice, check_number, check_owner, is_number

REMASKS = ("none", "cap", "rescale", "conf", "loop", "edit")
LOOP = (0.55, 0.05, 0.9)  # t_on, t_off and α of the paper's experiments


@dataclass(frozen=True)
class Remasking:
    """What happens to positions that are already decided.

    Args:
        remask: "none": they stay. "cap", "rescale", "conf", "loop": ReMDM masks some of them again. "edit": a decided
            token is replaced where the model is confident of another one.
        eta: η of "cap", "rescale" and "loop", in [0, 1].
        loop: [t_on, t_off, α] of "loop": α stays at that value from t_on to t_off. None takes the paper's values.
        editing_threshold: probability from which "edit" replaces, in [0, 1].

    Raises:
        ValueError: a setting that is out of range, that is missing, or that belongs to another remasking.
    """

    remask: str = "none"
    eta: float | None = None
    loop: Sequence[float] | None = None
    editing_threshold: float | None = None

    def __post_init__(self) -> None:
        check_choice("remask", self.remask, REMASKS)
        if self.eta is not None:
            check_number("eta", self.eta, most=1)
        if self.editing_threshold is not None:
            check_number("editing_threshold", self.editing_threshold, most=1)
        if self.loop is not None:
            if not isinstance(self.loop, Sequence) or len(self.loop) != 3 or not all(map(is_number, self.loop)):
                raise ValueError(f"loop {self.loop!r} must be three numbers, at most {LARGEST:,}")
            t_on, t_off, plateau = self.loop
            if not (0 < t_off < t_on < 1 and 0 < plateau < 1):
                raise ValueError(
                    f"loop {list(self.loop)} must be [t_on, t_off, α] with 0 < t_off < t_on < 1, 0 < α < 1"
                )
        check_owner("eta", self.eta, "remask", self.remask, ("cap", "rescale", "loop"))
        check_owner("loop", self.loop, "remask", self.remask, ("loop",), required=False)
        check_owner("editing_threshold", self.editing_threshold, "remask", self.remask, ("edit",))

    @property
    def masks_again(self) -> bool:
        """Whether decided positions may be masked again."""
        return self.remask in ("cap", "rescale", "conf", "loop")

    @property
    def edits(self) -> bool:
        """Whether decided tokens may be replaced."""
        return self.remask == "edit"

    def time(self, noise_R: Tensor) -> Tensor:
        """The t at which α = 1 - `noise_R`; t_on for the α of "loop"."""
        if self.remask != "loop":
            return noise_R
        t_on, t_off, plateau = self.loop or LOOP
        rising_R = 1 - (1 - noise_R) / plateau * (1 - t_on)
        last_R = noise_R / (1 - plateau) * t_off
        return torch.where(noise_R >= 1 - plateau, rising_R, last_R)

    def alphas(self, index: int, steps_R: Tensor, time_R: Tensor) -> Tensor:
        """α_t and α_s, float64 [R, 2]: α before and after step k of K.

        α = 1 - t, and t falls from `time_R`, usually 1, to 0. "loop" rises to its α at t_on, stays there until t_off,
        and rises to 1 (section 4.3 of the paper).
        """
        index_R = torch.full_like(steps_R, index)
        t_R2 = 1 - torch.stack([index_R, index_R + 1], -1).double() / steps_R[:, None]
        t_R2 = t_R2.clamp_min(0) * time_R[:, None]
        if self.remask != "loop":
            return 1 - t_R2
        t_on, t_off, plateau = self.loop or LOOP
        rising_R2 = (1 - t_R2) / (1 - t_on) * plateau
        last_R2 = 1 - (1 - plateau) * t_R2 / t_off
        return torch.where(t_R2 > t_on, rising_R2, torch.where(t_R2 > t_off, plateau, last_R2))

    def sigma(self, index: int, steps_R: Tensor, time_R: Tensor, probs_RN: Tensor) -> Tensor:
        """σ, float64 [R, N], at step k of K.

        "cap": min(η, σ_max). "rescale": η σ_max. "loop": min(η, σ_max) while t_off < t ≤ t_on, 0 outside. "conf":
        softmax(-p) over the decided positions of the row, times σ_max; 0 at masked positions.

        Args:
            index: k, from 0.
            steps_R: K.
            time_R: the time of step 0.
            probs_RN: probability of each decided token when it was decided; NaN elsewhere.
        """
        if not self.masks_again:
            return torch.zeros_like(probs_RN)
        before_R1, after_R1 = self.alphas(index, steps_R, time_R).split(1, dim=1)
        most_R1 = ((1 - after_R1) / before_R1.clamp_min(1e-12)).clamp(0, 1)
        if self.remask == "conf":
            return torch.softmax((-probs_RN).masked_fill(probs_RN.isnan(), -torch.inf), 1).nan_to_num(0.0) * most_R1
        assert self.eta is not None
        if self.remask == "rescale":
            return (self.eta * most_R1).expand_as(probs_RN)
        capped_R1 = most_R1.clamp_max(self.eta)
        if self.remask == "loop":
            t_on, t_off, _ = self.loop or LOOP
            t_R1 = (time_R * (1 - index / steps_R.double()))[:, None]
            capped_R1 = torch.where((t_R1 <= t_on) & (t_R1 > t_off), capped_R1, 0.0)
        return capped_R1.expand_as(probs_RN)

    def transition(
        self,
        index: int,
        steps_R: Tensor,
        time_R: Tensor,
        undecided_RN: Tensor,
        probs_RN: Tensor,
        uniform_RN: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """decide_RN and remask_RN, bool: which positions step k unmasks and masks again, each by itself.

        Args:
            index: k, from 0.
            steps_R, time_R: see `sigma`.
            undecided_RN: bool, the positions that are masked before the step.
            probs_RN: see `sigma`.
            uniform_RN: float64, a random number for each position; 1 at padding.
        """
        sigma_RN = self.sigma(index, steps_R, time_R, probs_RN)
        before_R1, after_R1 = self.alphas(index, steps_R, time_R).split(1, dim=1)
        decide_RN = (after_R1 - (1 - sigma_RN) * before_R1) / (1 - before_R1)
        return undecided_RN & (uniform_RN < decide_RN), ~undecided_RN & (uniform_RN < sigma_RN)
