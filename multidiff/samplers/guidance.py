"""Classifier-free guidance: the condition masked is the null."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(conditional_MV: Tensor, unconditional_MV: Tensor, scale: float) -> Tensor:
    """u + s (c - u) on log-probabilities up to a constant (Ho & Salimans 2022, arXiv 2207.12598, eq. 6 with s = 1 + w;
    Schiff et al. 2024, arXiv 2412.10193, for discrete diffusion). s = 1 is the conditional model, as in diffusers.
    """
    guided_MV = unconditional_MV + scale * (conditional_MV - unconditional_MV)
    return guided_MV.masked_fill(torch.isneginf(conditional_MV), -torch.inf)  # impossible stays impossible
