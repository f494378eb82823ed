"""Classifier-free guidance: the condition masked is the null.

Shape suffixes: M positions, V local ids, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def guide(conditional_MV: Tensor, nulls: Sequence[tuple[Tensor, Tensor | float]]) -> Tensor:
    """c + Σ (sᵢ - 1)(c - uᵢ) on log-probabilities up to a constant; with one null that is u + s (c - u).

    Ho & Salimans 2022, arXiv 2207.12598, eq. 6 with s = 1 + w; Schiff et al. 2024, arXiv 2412.10193, for discrete
    diffusion. With several conditions each null leaves out one of them (Liu et al. 2022, arXiv 2206.01714, eq. 11,
    instead adds conditions one by one to a model that sees none). s = 1 is the conditional model, as in diffusers.

    Args:
        nulls: logits uᵢ of the model that does not see condition i, and sᵢ, a number or one for each position, [M, 1].
    """
    guided_MV = conditional_MV
    for null_MV, scale in nulls:
        guided_MV = guided_MV + (scale - 1) * (conditional_MV - null_MV)
    return guided_MV.masked_fill(torch.isneginf(conditional_MV), -torch.inf)  # impossible stays impossible


def scale_at(scale: float, schedule: str | Sequence[float], step: int, steps_R: Tensor) -> Tensor:
    """scale_R at step k of each row's K, after "constant", "linear" (Chang et al. 2023, Muse, arXiv 2301.00704,
    section 2.7), or an interval of the share k/K (Kynkäänniemi et al. 2024, arXiv 2404.07724)."""
    whole_R = torch.full(steps_R.shape, float(scale), dtype=torch.float64, device=steps_R.device)
    if schedule == "constant":
        return whole_R
    if schedule == "linear":
        share_R = torch.where(steps_R > 1, step / (steps_R - 1).clamp_min(1).double(), 1.0).clamp_max(1)
        return 1 + (scale - 1) * share_R
    first, last = schedule
    share_R = step / steps_R.double()
    return torch.where((share_R >= float(first)) & (share_R <= float(last)), whole_R, 1.0)


def check_guidance(scale: float | Mapping[str, float], schedule: str | Sequence[float]) -> None:
    """Raises a ValueError for a schedule that is none, or that has no scale to follow."""
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
