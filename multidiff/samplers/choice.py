"""Choice: logits to one token per position and what the other parts need to know of it.

Shape suffixes: M positions, V local ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """One candidate for each position.

    Attributes:
        token_M: int64, local ids.
        log_p_M: float64, log-probability of the token under the model, before temperature and top-p.
    """

    token_M: Tensor
    log_p_M: Tensor


def choose(logits_MV: Tensor, uniform_M: Tensor, temperature: float, top_p: float) -> Choice:
    """Draw tokens by inverting the cumulative distribution at `uniform_M`, in fp64.

    In fp32 rare tokens fall below the rounding of the cumulative sum, which sharpens the distribution
    (Zheng et al. 2024, arXiv 2409.02908, section 4).

    Args:
        logits_MV: -inf at ids that cannot be.
        uniform_M: float64 in [0, 1), one number per position.
        temperature: divides the logits; 0 takes the most probable token, the lowest id among equals.
        top_p: keep the smallest set of tokens of at least this probability (Holtzman et al. 2020, arXiv 1904.09751).
    """
    log_p_MV = torch.log_softmax(logits_MV.double(), dim=-1)
    if temperature == 0:
        token_M = log_p_MV.argmax(dim=-1)
    else:
        p_MV = torch.softmax(log_p_MV / temperature, dim=-1)
        if top_p < 1:
            p_MV = _nucleus(p_MV, top_p)
        cumulative_MV = p_MV.cumsum(dim=-1)
        total_M1 = cumulative_MV[:, -1:]
        # `right`, and below the total even after rounding: a token of probability 0 is never drawn.
        point_M1 = torch.minimum(uniform_M[:, None] * total_M1, total_M1.nextafter(torch.zeros_like(total_M1)))
        token_M = torch.searchsorted(cumulative_MV, point_M1, right=True).squeeze(-1)
    return Choice(token_M, log_p_MV.gather(-1, token_M[:, None]).squeeze(-1))


def _nucleus(p_MV: Tensor, top_p: float) -> Tensor:
    sorted_MV, order_MV = p_MV.sort(dim=-1, descending=True, stable=True)
    before_MV = sorted_MV.cumsum(dim=-1) - sorted_MV
    return torch.zeros_like(p_MV).scatter(-1, order_MV, torch.where(before_MV < top_p, sorted_MV, 0.0))
