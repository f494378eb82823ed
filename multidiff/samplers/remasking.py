"""Remask: how likely a decided position is masked again (Wang et al. 2025, ReMDM, arXiv 2503.00307).

From α_t to α_s ≥ α_t, a decided position is masked with probability σ ≤ σ_max, and a masked one decided with
probability (α_s - (1 - σ) α_t) / (1 - α_t), which together keep every position's share of masks at 1 - α ("conf", whose
σ is 0 at masked positions, only about).

Shape suffixes: R rows, N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

REMASKS = ("none", "cap", "rescale", "conf", "loop", "edit")
POSTERIOR = ("cap", "rescale", "conf", "loop")  # those that are ReMDM's


def alphas(step_R: Tensor, steps_R: Tensor, remask: str, t_on: float, t_off: float, loop_alpha: float) -> Tensor:
    """α before and after step k of K, [R, 2]: 1 - t, t from 1 to 0. "loop" rises to its α at t_on, stays, and rises to
    1 from t_off (section 4.3)."""
    t_R2 = 1 - torch.stack([step_R, step_R + 1], -1).double() / steps_R[:, None]
    t_R2 = t_R2.clamp_min(0)
    if remask != "loop":
        return 1 - t_R2
    rising_R2 = (1 - t_R2) / (1 - t_on) * loop_alpha
    last_R2 = 1 - (1 - loop_alpha) * t_R2 / t_off
    return torch.where(t_R2 > t_on, rising_R2, torch.where(t_R2 > t_off, loop_alpha, last_R2))


def sigma(
    alpha_R2: Tensor,
    step_R: Tensor,
    steps_R: Tensor,
    probs_RN: Tensor,
    remask: str,
    eta: float,
    t_on: float,
    t_off: float,
) -> Tensor:
    """σ of each decided position, [R, N].

    Args:
        alpha_R2: α_t, α_s.
        probs_RN: probability of each decided token when it was decided; NaN elsewhere.
        remask: "cap": min(η, σ_max); "rescale": η σ_max; "conf": softmax(-p) over the decided, times σ_max;
            "loop": min(η, σ_max) within [t_off, t_on], 0 outside.
    """
    before_R1, after_R1 = alpha_R2[:, :1], alpha_R2[:, 1:]
    most_R1 = ((1 - after_R1) / before_R1.clamp_min(1e-12)).clamp(0, 1)
    if remask == "rescale":
        return (eta * most_R1).expand_as(probs_RN)
    if remask == "conf":
        return torch.softmax((-probs_RN).masked_fill(probs_RN.isnan(), -torch.inf), 1).nan_to_num(0.0) * most_R1
    capped_R1 = most_R1.clamp_max(eta)
    if remask == "loop":
        t_R1 = (1 - step_R.double() / steps_R)[:, None]
        capped_R1 = torch.where((t_R1 <= t_on) & (t_R1 > t_off), capped_R1, 0.0)
    return capped_R1.expand_as(probs_RN)
