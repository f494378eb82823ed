"""Frames: codes that stop together.

Where length varies, content ends at the first unit (token, frame) that holds stops. A unit of several codes, of all
residual levels, is content or stops as a whole. Each code has a stop of its own, which the model predicts one by one:

- a setting that rules out the stop of one code of a frame, or all else, does so at all of its codes;
- once a code of a frame is decided, the others follow: beside content no stop can be drawn, and beside a stop only
  stops. What the model thinks of the rest is renormalised;
- of codes that are decided in the same step, the one of the lowest level decides as if alone, and the others follow.

So with one code a step, every draw is from the model's own conditional, restricted to what its frame can still be.
Draws in the same step are exact too where the codes of a frame are independent once it is known whether it stops. What
counts and orders look at is the free draw. Editing never turns content into a stop, nor a stop into content.

Shape suffixes: R rows, N columns, M = positions of `where_RN`, row by row; V local ids, F frames, U some of M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frames:
    """The frames of a table of positions.

    Attributes:
        size: F, the number of frames.
        number_RN: int64, frame of each position; F where it is in none.
        key_RN: int64, order of the positions: by level, then by place. Key modulo R·N is the flat place.
        eos_RN: int64, local id of the stop.
        content_RN, only_eos_RN: bool, whether settings rule out that the frame stops, or that it does not.
    """

    size: int
    number_RN: Tensor
    key_RN: Tensor
    eos_RN: Tensor
    content_RN: Tensor
    only_eos_RN: Tensor

    @classmethod
    def of(cls, frame_RN: Tensor, levels_RN: Tensor, eos_RN: Tensor, content_RN: Tensor, only_eos_RN: Tensor) -> Frames:
        """Frames by number, negative where a position is in none, and what settings rule out at single positions."""
        size = int(frame_RN.max()) + 1
        number_RN = frame_RN.where(frame_RN >= 0, size)
        place_RN = torch.arange(frame_RN.numel(), device=frame_RN.device).view_as(frame_RN)
        key_RN = levels_RN * frame_RN.numel() + place_RN
        ruled = (_beside(rule_RN, number_RN, size) for rule_RN in (content_RN, only_eos_RN))
        return cls(size, number_RN, key_RN, eos_RN, *ruled)

    def decided(self, sample_RN: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
        """content_RN, only_eos_RN: positions whose frame can hold no stop, and those where it can hold nothing else."""
        decided_RN, eos_RN = (sample_RN >= 0) & (sample_RN != mask_token_id), sample_RN == self.eos_RN
        content_RN = self.content_RN | _beside(decided_RN & ~eos_RN, self.number_RN, self.size)
        only_eos_RN = self.only_eos_RN | _beside(decided_RN & eos_RN, self.number_RN, self.size)
        return content_RN, only_eos_RN & ~content_RN

    def restrict(self, logits_MV: Tensor, content_M: Tensor, only_eos_M: Tensor, eos_M: Tensor) -> Tensor:
        """Logits with -inf at stops, or at all else. They may be on another device than all else: nothing waits."""
        for where_M, stays in ((only_eos_M, True), (content_M, False)):
            row_U = torch.nonzero(where_M).flatten()
            if len(row_U):
                row_U, eos_U = (part.to(logits_MV.device, non_blocking=True) for part in (row_U, eos_M[row_U]))
                logits_MV = logits_MV.index_fill(0, row_U, -torch.inf) if stays else logits_MV
                value = logits_MV.new_full((), 0.0 if stays else -torch.inf)
                logits_MV = logits_MV.index_put((row_U, eos_U), value)
        return logits_MV

    def later(self, where_RN: Tensor) -> Tensor:
        """Positions of `where_RN` whose frame has another there of a lower level, or of the same further ahead."""
        return where_RN & (self.number_RN < self.size) & (self._first(where_RN) != self.key_RN)

    def follow(self, where_RN: Tensor, sample_RN: Tensor) -> tuple[Tensor, Tensor]:
        """content_RN, only_eos_RN: of the positions `later`, those whose frame's first in `where_RN` is content in
        `sample_RN`, and those where it is a stop."""
        later_RN, first_RN = self.later(where_RN), self._first(where_RN) % self.key_RN.numel()
        eos_RN = sample_RN.take(first_RN) == self.eos_RN.take(first_RN)
        return later_RN & ~eos_RN, later_RN & eos_RN

    def _first(self, where_RN: Tensor) -> Tensor:
        """The lowest key of `where_RN` in each position's frame; a huge one where it has none."""
        first_F = self.key_RN.new_full((self.size + 1,), torch.iinfo(torch.int64).max)
        return first_F.scatter_reduce(0, self.number_RN[where_RN], self.key_RN[where_RN], "amin")[self.number_RN]


def _beside(where_RN: Tensor, number_RN: Tensor, size: int) -> Tensor:
    """Positions whose frame has one of `where_RN`."""
    held_F = torch.zeros(size + 1, dtype=torch.bool, device=where_RN.device)
    held_F[number_RN[where_RN]] = True
    held_F[size] = False
    return held_F[number_RN]
