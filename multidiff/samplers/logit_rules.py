"""Logit rules: tokens and lengths that a user rules out or demands.

Shape suffixes: R rows, N columns, M = positions of `where_RN`, row by row; V local ids, X levels times ids, 3 axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multidiff.samplers.checks import (
    LARGEST,
    check_number,
    check_table,
    check_whole_number,
    check_whole_numbers,
    is_whole_number,
)
from multidiff.samplers.state import State


@dataclass(frozen=True)
class LogitRules:
    """What may be drawn, beside what the model says.

    Args:
        suppress_tokens: local ids that are never drawn.
        forced_tokens: {place: local id}. The place counts the codes to fill in from 0, through all segments of the
            tokenizer in the document. JSON writes it as text, which is accepted.
        min_length, max_length: of content whose length varies, in its unit (tokens, frames).
        repetition_penalty: multiplies the log-probability of ids that this run has decided in the document, level by
            level; 1 is none.

    Raises:
        ValueError: a setting of the wrong kind or out of range.
    """

    suppress_tokens: Sequence[int] | None = None
    forced_tokens: Mapping[int, int] | None = None
    min_length: int | None = None
    max_length: int | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.suppress_tokens is not None:
            check_whole_numbers("suppress_tokens", self.suppress_tokens)
        if self.forced_tokens is not None:
            check_table("forced_tokens", self.forced_tokens)
            if not all(map(is_place, self.forced_tokens)):
                raise ValueError(
                    f"forced_tokens {self.forced_tokens!r} must be a table of whole numbers, place: id, "
                    f"at most {LARGEST:,}"
                )
        for name in ("min_length", "max_length"):
            if getattr(self, name) is not None:
                check_whole_number(name, getattr(self, name), least=0)
        least, most = self.min_length, self.max_length
        if least is not None and most is not None and least > most:
            raise ValueError(f"min_length {least} is more than max_length {most}")
        check_number("repetition_penalty", self.repetition_penalty, above=0)

    def check_codes(self, size: int, number: int | None, *, varies: bool) -> None:
        """Raises a `ValueError` for ids, places and lengths that the codes to fill in do not have.

        Args:
            size: V, the number of ids.
            number: how many codes are to be filled in, in the row that has most; None where that is not known yet.
            varies: whether the length of their content varies.
        """
        suppressed = set(self.suppress_tokens or ())
        for name, ids in (("suppress_tokens", suppressed), ("forced_tokens", self._forced.values())):
            for token in ids:
                if not 0 <= token < size:
                    raise ValueError(f"{name}: no code is called {token}; there are 0 to {size - 1}")
        if len(suppressed) == size:
            raise ValueError(f"suppress_tokens leaves none of the {size} codes to draw from")
        for place, token in self._forced.items():
            if number is not None and place >= number:
                raise ValueError(
                    f"forced_tokens: place {place} is none of the {number} codes to fill in, 0 to {number - 1}"
                )
            if token in suppressed:
                raise ValueError(f"forced_tokens wants code {token} at place {place}, which suppress_tokens rules out")
        for name in ("min_length", "max_length"):
            if getattr(self, name) is not None and not varies:
                raise ValueError(
                    f"{name} {getattr(self, name)} needs codes whose length varies; here the canvas sets the length"
                )

    def frame_rules(self, sample_RN: Tensor, coords_RN3: Tensor, eos_RN: Tensor) -> tuple[Tensor, Tensor]:
        """content_RN, only_eos_RN, bool: the positions where the rules rule out EOS, and those where they rule out all
        else; False where the content cannot end."""
        suppressed = torch.tensor(sorted(set(self.suppress_tokens or ())), dtype=torch.int64, device=eos_RN.device)
        content_RN = torch.isin(eos_RN, suppressed)
        # All ids below EOS are suppressed if there are as many of them as its id says.
        only_eos_RN = torch.searchsorted(suppressed, eos_RN.contiguous()) == eos_RN
        length_RN = coords_RN3[..., 0]
        if self.min_length is not None:
            content_RN = content_RN | (length_RN < self.min_length)
        if self.max_length is not None:
            only_eos_RN = only_eos_RN | (length_RN >= self.max_length)
        for place, token in self._forced.items():
            content_RN[:, place] |= eos_RN[:, place] != token
            only_eos_RN[:, place] |= eos_RN[:, place] == token
        there_RN = (sample_RN >= 0) & (eos_RN >= 0)
        return content_RN & there_RN, only_eos_RN & there_RN

    def apply(
        self,
        logits_MV: Tensor,
        sample_RN: Tensor,
        where: Tensor,
        state: State,
        eos_RN: Tensor,
        coords_RN3: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits with -inf at ids that the rules rule out, and left_M, bool: where that leaves any.

        left_M is None if no rule can leave nothing. The tables are read where they are, and only what the logits need
        is sent to the device of these.
        """
        device = logits_MV.device
        row_M, column_M = where.nonzero().unbind(1)

        def sent(table: Tensor) -> Tensor:
            return table.to(device, non_blocking=True)

        if self.repetition_penalty != 1:
            # By level and id. EOS in the padding behind the content is no repetition.
            size, levels = state.mask_token_id + 1, int(state.levels_RN.max()) + 1
            held_RX = torch.zeros(len(sample_RN), levels * size, dtype=torch.bool, device=sample_RN.device)
            counts_RN = (sample_RN >= 0) & (sample_RN != eos_RN)
            held_RX.scatter_(1, state.levels_RN * size + sample_RN.where(counts_RN, state.mask_token_id), True)
            held_MV = sent(held_RX.view(-1, levels, size))[sent(row_M), sent(state.levels_RN[where]), :-1]
            log_probs_MV = torch.log_softmax(logits_MV, -1)
            logits_MV = torch.where(held_MV, log_probs_MV * self.repetition_penalty, log_probs_MV)
        if not self._said:
            return logits_MV, None
        id_V = torch.arange(logits_MV.shape[1], device=device)
        if self.suppress_tokens:
            logits_MV = logits_MV.index_fill(1, sent(torch.tensor(self.suppress_tokens)), -torch.inf)
        length_M, eos_M = coords_RN3[where][:, 0], eos_RN[where]
        if self.min_length is not None:
            early_M = torch.where(length_M < self.min_length, eos_M, -1)
            logits_MV = logits_MV.masked_fill(id_V == sent(early_M)[:, None], -torch.inf)
        if self.max_length is not None:
            must_M = (length_M >= self.max_length) & (eos_M >= 0)
            logits_MV = logits_MV.masked_fill(sent(must_M)[:, None] & (id_V != sent(eos_M)[:, None]), -torch.inf)
        for place, token in self._forced.items():
            logits_MV = logits_MV.masked_fill(sent(column_M == place)[:, None] & (id_V != token), -torch.inf)
        left_M = ~logits_MV.isneginf().all(-1)
        return logits_MV.masked_fill(~left_M[:, None], 0), left_M

    def nothing_left(self, where: str) -> ValueError:
        """The error of rules that leave nothing to draw; `where` says at which positions."""
        return ValueError(f"nothing is left to draw {where}: change {', '.join(self._said)}")

    @property
    def _forced(self) -> dict[int, int]:
        return {int(place): token for place, token in (self.forced_tokens or {}).items()}

    @property
    def _said(self) -> list[str]:
        """The rules that are set and may leave nothing to draw."""
        rules = {name: getattr(self, name) for name in ("suppress_tokens", "forced_tokens", "min_length", "max_length")}
        return [f"{name} {value}" for name, value in rules.items() if value is not None]


def is_place(key: object) -> bool:
    """Whether `key` is a place among codes, as a number or as JSON's text."""
    if isinstance(key, str):
        return key.isdecimal() and len(key) < 10
    return is_whole_number(key) and isinstance(key, int) and key >= 0
