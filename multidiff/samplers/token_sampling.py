"""Token sampling: one token for each position, drawn from its logits, and what other parts need to know about it.

Shape suffixes: M positions, U some of them, V local ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from multidiff.samplers.checks import LARGEST, check_choice, check_number, check_whole_number, refuse

_TOGETHER = 2**22  # logits that are taken to fp64 together


class Candidates:
    """A drawn token for each position, and how the model rates the position.

    Attributes:
        token_M: int64, local ids.
        log_probs_M: float64, log-probability of the token under the model, before temperature and truncation.
        best_M: int64, the most probable token, the lowest id among equals.
        best_probs_M: float64, its probability.
        margin_M: float64, its probability minus that of the second (Kim et al. 2025, arXiv 2502.06768).
        entropy_M: float64, entropy in nats.
        content_M, content_log_probs_M: the token if the position must be content, and its log-probability then; see
            `TokenSampling.sample_content`.
    """

    def __init__(self, token_M: Tensor, log_probs_MV: Tensor):
        self.token_M = token_M
        self.log_probs_MV = log_probs_MV
        self.log_probs_M = log_probs_MV.gather(-1, token_M[:, None]).squeeze(-1)
        self.content_M, self.content_log_probs_M = self.token_M, self.log_probs_M

    def to(self, device: torch.device, *names: str) -> Candidates:
        """Token, log-probability and the attributes of these names on another device, in one transfer."""
        if device == self.token_M.device:
            return self
        names = ("token_M", "log_probs_M", *names)
        # float64 holds ids exactly.
        values = torch.stack([getattr(self, name).double() for name in names]).to(device)
        moved = Candidates.__new__(Candidates)
        for name, value_M in zip(names, values, strict=True):
            setattr(moved, name, value_M.to(getattr(self, name).dtype))
        return moved

    @classmethod
    def joined(cls, parts: Iterable[Candidates], *names: str) -> Candidates:
        """The candidates of several parts of the positions, of which only token, log-probability and the attributes of
        these names are left. They need no memory for each token."""
        names = ("token_M", "log_probs_M", *names)
        values = zip(*([getattr(part, name) for name in names] for part in parts), strict=True)
        made = cls.__new__(cls)
        for name, of_parts in zip(names, values, strict=True):
            setattr(made, name, torch.cat(of_parts))
        made.content_M, made.content_log_probs_M = made.token_M, made.log_probs_M
        return made

    @cached_property
    def best_M(self) -> Tensor:
        return self.log_probs_MV.argmax(-1)

    @cached_property
    def best_probs_M(self) -> Tensor:
        return self.log_probs_MV.amax(-1).exp()

    @cached_property
    def margin_M(self) -> Tensor:
        if self.log_probs_MV.shape[-1] == 1:
            return torch.ones_like(self.log_probs_M)
        first_M, second_M = self.log_probs_MV.topk(2, dim=-1).values.exp().unbind(-1)
        return first_M - second_M

    @cached_property
    def entropy_M(self) -> Tensor:
        return torch.special.entr(self.log_probs_MV.exp()).sum(-1)


@dataclass(frozen=True)
class TokenSampling:
    """How a token is drawn from the logits of its position, in fp64.

    In fp32 rare tokens fall below the rounding, which sharpens the distribution (Zheng et al. 2024, arXiv 2409.02908,
    section 4). The truncations apply in the order in which they stand here.

    Args:
        temperature: divides the logits; 0 takes the most probable token, the lowest id among equals.
        top_k: keep the k most probable tokens; None keeps all.
        top_p: keep the smallest set of tokens of at least this probability (Holtzman et al. 2020, arXiv 1904.09751).
        typical_p: keep the smallest set of at least this probability whose surprise is nearest to the entropy (Meister
            et al. 2023, arXiv 2202.00666).
        draw: "inverse" inverts the cumulative distribution at one random number a position. "gumbel" takes
            argmax(log p - log(-log u)) with one random number a token, as LLaDA does. Both draw from the same
            distribution; the first is faster.

    Raises:
        ValueError: a setting that is out of range, or one that has no meaning at temperature 0.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    typical_p: float = 1.0
    draw: str = "inverse"

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, least=0)
        if 0 < self.temperature < 1 / LARGEST:
            raise ValueError(f"temperature {self.temperature} must be 0, which is greedy, or at least {1 / LARGEST}")
        if self.top_k is not None:
            check_whole_number("top_k", self.top_k, least=1)
        check_number("top_p", self.top_p, above=0, most=1)
        check_number("typical_p", self.typical_p, above=0, most=1)
        check_choice("draw", self.draw, ("inverse", "gumbel"))
        if self.temperature == 0:
            for name, neutral in (("top_k", None), ("top_p", 1.0), ("typical_p", 1.0), ("draw", "inverse")):
                if getattr(self, name) != neutral:
                    refuse(("temperature", self.temperature), (name, getattr(self, name)))

    @property
    def is_per_token(self) -> bool:
        """Whether a draw takes a random number for each token, rather than one for the position."""
        return self.draw == "gumbel"

    def sample(self, logits_MV: Tensor, uniform: Tensor, reads: Sequence[str] | None = None) -> Candidates:
        """Draw a token for each position; see `sample_tokens`.

        Args:
            logits_MV, uniform: of `sample_tokens`.
            reads: the attributes of candidates that are needed beside token and log-probability; None is all. Where
                they are named, many logits are taken a part at a time, which makes a step several times as small.
        """
        rows = _rows(logits_MV)
        if reads is not None and len(logits_MV) > rows:
            parts = zip(logits_MV.split(rows), uniform.split(rows), strict=True)
            return Candidates.joined((self.sample(*part) for part in parts), *reads)
        return sample_tokens(logits_MV, uniform, self.temperature, self.top_k, self.top_p, self.typical_p)

    def sample_content(
        self, candidates: Candidates, row_U: Tensor, eos_U: Tensor, logits_MV: Tensor, uniform_U: Tensor
    ) -> None:
        """Set `content_M` and `content_log_probs_M` of positions that may turn out to be content.

        Their tokens follow the distribution without EOS, truncated after EOS is taken out, as when codes are decided
        one by one. Without truncation, a first draw that is not EOS already follows it and is kept; the others are
        drawn again. With truncation, the first draw chose from another set, so all are drawn again.

        Args:
            candidates: what `sample` returned for `logits_MV`.
            row_U: the positions, rows of `logits_MV`.
            eos_U: local id of EOS at each.
            logits_MV: as `sample` took them.
            uniform_U: independent of the first draw. For Gumbel draws the same [U, V] as there will do: the second
                largest does not depend on which is the largest.
        """
        rows = _rows(logits_MV)
        if len(row_U) > rows:
            for part in zip(row_U.split(rows), eos_U.split(rows), uniform_U.split(rows), strict=True):
                self.sample_content(candidates, part[0], part[1], logits_MV, part[2])
            return
        again = self.sample(logits_MV[row_U].scatter(1, eos_U[:, None], -torch.inf), uniform_U)
        token_U = again.token_M
        if self.top_k is None and self.top_p == self.typical_p == 1:
            token_U = torch.where(candidates.token_M[row_U] == eos_U, token_U, candidates.token_M[row_U])
        log_probs_U = again.log_probs_MV.gather(-1, token_U[:, None]).squeeze(-1)
        candidates.content_M = candidates.content_M.index_put((row_U,), token_U)
        candidates.content_log_probs_M = candidates.content_log_probs_M.index_put((row_U,), log_probs_U)


def sample_tokens(
    logits_MV: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    typical_p: float = 1.0,
) -> Candidates:
    """Draw tokens in fp64.

    Args:
        logits_MV: -inf at ids that cannot be.
        uniform: float64 in [0, 1). Of shape [M], the cumulative distribution is inverted at these numbers. Of shape
            [M, V], they become Gumbel variables.
        temperature, top_k, top_p, typical_p: see `TokenSampling`.
    """
    log_probs_MV = torch.log_softmax(logits_MV.double(), dim=-1)
    if temperature == 0:
        return Candidates(log_probs_MV.argmax(dim=-1), log_probs_MV)
    p_MV = log_probs_MV.exp() if temperature == 1 else torch.softmax(log_probs_MV / temperature, dim=-1)
    if top_k is not None and top_k < p_MV.shape[-1]:
        kept_Mk = p_MV.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        p_MV = _renormalised(torch.zeros_like(p_MV).scatter(-1, kept_Mk, p_MV.gather(-1, kept_Mk)))
    if top_p < 1:
        p_MV = _renormalised(_smallest_set(p_MV, -p_MV, top_p))
    if typical_p < 1:
        entropy_M1 = torch.special.entr(p_MV).sum(-1, keepdim=True)
        p_MV = _renormalised(_smallest_set(p_MV, (-p_MV.log() - entropy_M1).abs(), typical_p))
    if uniform.dim() == 2:
        return Candidates((p_MV.log() + gumbel(uniform)).argmax(dim=-1), log_probs_MV)
    cumulative_MV = p_MV.cumsum(dim=-1)
    total_M1 = cumulative_MV[:, -1:]
    # `right`, and below the total even after rounding, so that a token of probability 0 is never drawn.
    point_M1 = torch.minimum(uniform[:, None] * total_M1, total_M1.nextafter(torch.zeros_like(total_M1)))
    token_M1 = torch.searchsorted(cumulative_MV, point_M1, right=True)
    return Candidates(token_M1.squeeze(-1).clamp_max(log_probs_MV.shape[-1] - 1), log_probs_MV)  # clamps after NaN


class NotFiniteError(ValueError):
    """Logits hold NaN or Inf, so there is nothing to draw from."""


def check_finite(value_M: Tensor) -> None:
    """Raises a `NotFiniteError` if logits were NaN or +Inf. Every probability of their position is then NaN."""
    if bool(value_M.isnan().any()):
        raise NotFiniteError(
            "the transformer's logits hold NaN or Inf: check its weights, its precision and guidance_scale"
        )


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel variables -log(-log u), of uniform float64 numbers in [0, 1)."""
    return -(-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()


def _rows(logits_MV: Tensor) -> int:
    return max(1, _TOGETHER // logits_MV.shape[-1])


def _smallest_set(p_MV: Tensor, key_MV: Tensor, mass: float) -> Tensor:
    """p where the tokens of smaller key together have less than `mass`, else 0."""
    order_MV = key_MV.argsort(dim=-1, stable=True)
    sorted_MV = p_MV.gather(-1, order_MV)
    before_MV = sorted_MV.cumsum(dim=-1) - sorted_MV
    return torch.zeros_like(p_MV).scatter(-1, order_MV, torch.where(before_MV < mass, sorted_MV, 0.0))


def _renormalised(p_MV: Tensor) -> Tensor:
    return p_MV / p_MV.sum(-1, keepdim=True)
