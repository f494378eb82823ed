"""Classifier-free guidance. The null is the model that sees the condition masked.

Shape suffixes: M positions, V local ids, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multidiff.samplers.checks import LARGEST, is_number


@dataclass(frozen=True)
class Guidance:
    """How strongly the condition guides, and when.

    Args:
        guidance_scale: s where a run does not say; 1 is none. One number for all given segments together, or
            {tokenizer: scale}, each with a null that does not see that tokenizer's given segments.
        guidance_schedule: "constant"; "linear", from 1 at the first step to s at the last (Chang et al. 2023, Muse,
            arXiv 2301.00704, section 2.7); or [first, last], s while first ≤ k/K ≤ last and 1 outside (Kynkäänniemi et
            al. 2024, arXiv 2404.07724).

    Raises:
        ValueError: a scale that is not finite, an unknown schedule, or a schedule without a scale to follow.
    """

    guidance_scale: float | Mapping[str, float] = 1.0
    guidance_schedule: str | Sequence[float] = "constant"

    def __post_init__(self) -> None:
        check_scale(self.guidance_scale)
        scale, schedule = self.guidance_scale, self.guidance_schedule
        if isinstance(schedule, str):
            known = schedule in ("constant", "linear")
        else:
            numbers = isinstance(schedule, Sequence) and all(type(share) in (int, float) for share in schedule)
            known = numbers and len(schedule) == 2 and 0 <= schedule[0] < schedule[1] <= 1
        if not known:
            raise ValueError(f"guidance_schedule {schedule!r} must be constant, linear or [first, last] within [0, 1]")
        scales = scale.values() if isinstance(scale, Mapping) else (scale,)
        if schedule != "constant" and all(value == 1 for value in scales):
            raise ValueError(f"guidance_schedule {schedule!r} needs guidance_scale, which is {scale}")

    def scale_at(self, scale: float, step: int, steps_R: Tensor) -> Tensor:
        """scale_R, float64: the scale of each row at step k of K, after the schedule.

        Args:
            scale: s.
            step: k, from 0.
            steps_R: K.
        """
        whole_R = torch.full(steps_R.shape, float(scale), dtype=torch.float64, device=steps_R.device)
        if self.guidance_schedule == "constant":
            return whole_R
        if self.guidance_schedule == "linear":
            share_R = torch.where(steps_R > 1, step / (steps_R - 1).clamp_min(1).double(), 1.0).clamp_max(1)
            return 1 + (scale - 1) * share_R
        first, last = self.guidance_schedule
        share_R = step / steps_R.double()
        return torch.where((share_R >= float(first)) & (share_R <= float(last)), whole_R, 1.0)


def check_scale(scale: Any) -> None:
    """Raises a `ValueError` unless `scale` is a finite guidance scale, or a table of them."""
    values = scale.values() if isinstance(scale, Mapping) else (scale,)
    if not all(map(is_number, values)):
        raise ValueError(f"guidance_scale {scale!r} must be a number or a table of numbers, at most {LARGEST:,}")


def guide(conditional_MV: Tensor, nulls: Sequence[tuple[Tensor, Tensor | float]]) -> Tensor:
    """Guided logits, c + Σ (sᵢ - 1)(c - uᵢ), up to a constant. With one null this is u + s (c - u).

    Ho & Salimans 2022, arXiv 2207.12598, eq. 6 with s = 1 + w; Schiff et al. 2024, arXiv 2412.10193, for discrete
    diffusion. With several conditions each null leaves out one of them. (Liu et al. 2022, arXiv 2206.01714, eq. 11,
    instead add conditions one by one to a model that sees none.) s = 1 is the conditional model, as in diffusers.

    Args:
        conditional_MV: log-probabilities c of the model that sees all conditions; -inf at ids that cannot be, which
            stay impossible.
        nulls: log-probabilities uᵢ of the model that does not see condition i, and sᵢ: a number, or [M, 1].
    """
    if not nulls:
        return conditional_MV
    guided_MV = conditional_MV
    for null_MV, scale in nulls:
        guided_MV = guided_MV + (scale - 1) * (conditional_MV - null_MV)
    return guided_MV.masked_fill(torch.isneginf(conditional_MV), -torch.inf)
