"""Candidates: logits to one token per position and what the other parts need to know of it.

Shape suffixes: M positions, U some of them, V local ids.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Candidates:
    """One candidate for each position.

    Attributes:
        token_M: int64, local ids.
        log_p_M: float64, log-probability of the token under the model, before temperature and truncation.
        best_M: int64, the most probable token, the lowest id among equals.
        content_M, content_log_p_M: token and log-probability should the position be no stop; see `follow`.
    """

    def __init__(self, token_M: Tensor, log_p_MV: Tensor):
        self.token_M = token_M
        self._log_p_MV = log_p_MV
        self.log_p_M = log_p_MV.gather(-1, token_M[:, None]).squeeze(-1)
        self.content_M, self.content_log_p_M = self.token_M, self.log_p_M

    def follow(self, row_U: Tensor, eos_U: Tensor, logits_MV: Tensor, uniform_U: Tensor, **truncation: Any) -> None:
        """Prepare for positions U, which may have to be content because another of their frame is.

        Their tokens follow the distribution without the stop, truncated after the stop is taken out, as when codes are
        decided one by one. Without truncation, a first draw that is not the stop follows it already and stays; the
        others are drawn again. With truncation, the first draw chose from another set, so all are drawn again.

        Args:
            row_U: rows of `logits_MV`.
            eos_U: local id of the stop.
            logits_MV, truncation: as `sample_tokens` took them.
            uniform_U: independent of the first draw, or of shape UV and the same as there: the second largest of a
                Gumbel draw does not depend on which is the largest.
        """
        logits_UV = logits_MV[row_U].scatter(1, eos_U[:, None], -torch.inf)
        other = sample_tokens(logits_UV, uniform_U, **truncation)
        token_U = other.token_M
        if truncation.get("top_k") is None and truncation.get("top_p", 1) == truncation.get("typical_p", 1) == 1:
            token_U = torch.where(self.token_M[row_U] == eos_U, token_U, self.token_M[row_U])
        log_p_U = other._log_p_MV.gather(-1, token_U[:, None]).squeeze(-1)
        self.content_M = self.content_M.index_put((row_U,), token_U)
        self.content_log_p_M = self.content_log_p_M.index_put((row_U,), log_p_U)

    def to(self, device: torch.device, *names: str) -> Candidates:
        """Token, log-probability and the attributes of these names on another device, in one transfer."""
        if device == self.token_M.device:
            return self
        names = ("token_M", "log_p_M", *names)
        # float64 holds ids exactly.
        values = torch.stack([getattr(self, name).double() for name in names]).to(device)
        moved = Candidates.__new__(Candidates)
        for name, value_M in zip(names, values, strict=True):
            setattr(moved, name, value_M.to(getattr(self, name).dtype))
        return moved

    @cached_property
    def best_M(self) -> Tensor:
        return self._log_p_MV.argmax(-1)

    @cached_property
    def best_p_M(self) -> Tensor:
        """Probability of the most probable token."""
        return self._log_p_MV.amax(-1).exp()

    @cached_property
    def margin_M(self) -> Tensor:
        """Probability of the most probable token less that of the second (Kim et al. 2025, arXiv 2502.06768)."""
        if self._log_p_MV.shape[-1] == 1:
            return torch.ones_like(self.log_p_M)
        first_M, second_M = self._log_p_MV.topk(2, dim=-1).values.exp().unbind(-1)
        return first_M - second_M

    @cached_property
    def entropy_M(self) -> Tensor:
        """Entropy, nats."""
        return torch.special.entr(self._log_p_MV.exp()).sum(-1)


def sample_tokens(
    logits_MV: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    typical_p: float = 1.0,
) -> Candidates:
    """Draw tokens in fp64.

    In fp32 rare tokens fall below the rounding, which sharpens the distribution (Zheng et al. 2024,
    arXiv 2409.02908, section 4).

    Args:
        logits_MV: -inf at ids that cannot be.
        uniform: float64 in [0, 1). Shape M: one number a position, at which the cumulative distribution is inverted.
            Shape MV: one a token, for the Gumbel-max trick, argmax(log p - log(-log u)), as LLaDA draws.
        temperature: divides the logits; 0 takes the most probable token, the lowest id among equals.
        top_k: keep the k most probable tokens; None keeps all.
        top_p: keep the smallest set of tokens of at least this probability (Holtzman et al. 2020, arXiv 1904.09751).
        typical_p: keep the smallest set of at least this probability whose surprise is nearest to the entropy (Meister
            et al. 2023, arXiv 2202.00666).
    """
    log_p_MV = torch.log_softmax(logits_MV.double(), dim=-1)
    if temperature == 0:
        return Candidates(log_p_MV.argmax(dim=-1), log_p_MV)
    p_MV = torch.softmax(log_p_MV / temperature, dim=-1)
    if top_k is not None and top_k < p_MV.shape[-1]:
        kept_Mk = p_MV.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        p_MV = _renormalised(torch.zeros_like(p_MV).scatter(-1, kept_Mk, p_MV.gather(-1, kept_Mk)))
    if top_p < 1:
        p_MV = _renormalised(_smallest_set(p_MV, -p_MV, top_p))
    if typical_p < 1:
        entropy_M1 = torch.special.entr(p_MV).sum(-1, keepdim=True)
        p_MV = _renormalised(_smallest_set(p_MV, (-p_MV.log() - entropy_M1).abs(), typical_p))
    if uniform.dim() == 2:
        return Candidates((p_MV.log() + gumbel(uniform)).argmax(dim=-1), log_p_MV)
    cumulative_MV = p_MV.cumsum(dim=-1)
    total_M1 = cumulative_MV[:, -1:]
    # `right`, and below the total even after rounding: a token of probability 0 is never drawn.
    point_M1 = torch.minimum(uniform[:, None] * total_M1, total_M1.nextafter(torch.zeros_like(total_M1)))
    token_M1 = torch.searchsorted(cumulative_MV, point_M1, right=True)
    return Candidates(token_M1.squeeze(-1).clamp_max(log_p_MV.shape[-1] - 1), log_p_MV)  # beyond the last where NaN


class NotFiniteError(ValueError):
    """Logits hold NaN or Inf, so there is nothing to draw from."""


def check_finite(value_M: Tensor) -> None:
    """Raises a `NotFiniteError` if logits were NaN or +Inf; then every probability of their position is NaN."""
    if bool(value_M.isnan().any()):
        raise NotFiniteError(
            "the transformer's logits hold NaN or Inf: check its weights, its precision and guidance_scale"
        )


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel variables, -log(-log u), of uniform ones in [0, 1), float64."""
    return -(-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()


def _smallest_set(p_MV: Tensor, key_MV: Tensor, mass: float) -> Tensor:
    """p where the tokens of smaller key together have less than `mass`, else 0."""
    order_MV = key_MV.argsort(dim=-1, stable=True)
    sorted_MV = p_MV.gather(-1, order_MV)
    before_MV = sorted_MV.cumsum(dim=-1) - sorted_MV
    return torch.zeros_like(p_MV).scatter(-1, order_MV, torch.where(before_MV < mass, sorted_MV, 0.0))


def _renormalised(p_MV: Tensor) -> Tensor:
    return p_MV / p_MV.sum(-1, keepdim=True)
