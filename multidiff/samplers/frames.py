"""Frames: codes that are all EOS or all content.

Where length varies, content ends at the first unit (token, frame) whose codes are EOS. A unit of several codes, of all
residual levels, is content or EOS as a whole. The model predicts the EOS of each code by itself, so the sampler keeps
the codes of a frame together:

- A setting that rules out EOS at one code of a frame, or all but EOS, does so at all of its codes.
- Once a code of a frame is decided, the others follow. Beside content no EOS can be drawn, and beside EOS only EOS.
  The model's distribution over the rest is renormalised.
- Of codes that are decided in the same step, the one of the lowest level decides as if it stood alone. The others
  follow it.

With one code a step, every draw is therefore from the model's own conditional, restricted to what its frame can still
be. Draws in the same step are exact too if the codes of a frame are independent once it is known whether it is EOS.
Orders and unmasking rules look at the unrestricted draw. Editing never turns content into EOS, nor EOS into content.

Shape suffixes: R rows, N columns, M = positions of `where_RN`, row by row; V local ids, F frames, U some of M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multidiff.samplers.state import draw_uniform
from multidiff.samplers.token_sampling import Candidates, TokenSampling


@dataclass(frozen=True)
class Frames:
    """The frames of a table of positions.

    Attributes:
        size: F, the number of frames.
        number_RN: int64, frame of each position; F where it is in none.
        key_RN: int64, orders the positions by level, then by place. Key modulo R·N is the flat place.
        eos_RN: int64, local id of EOS.
        content_RN, only_eos_RN: bool, where settings rule out that the frame is EOS, or that it is content.
    """

    size: int
    number_RN: Tensor
    key_RN: Tensor
    eos_RN: Tensor
    content_RN: Tensor
    only_eos_RN: Tensor

    @classmethod
    def of(cls, frame_RN: Tensor, levels_RN: Tensor, eos_RN: Tensor, content_RN: Tensor, only_eos_RN: Tensor) -> Frames:
        """The frames of positions that can be EOS.

        Args:
            frame_RN: number of each position's frame, negative where it is in none.
            levels_RN: residual levels.
            eos_RN: local id of EOS at each position; -1 where the content cannot end, which is in no frame then.
            content_RN, only_eos_RN: bool, where settings rule out EOS, or all but EOS, at single positions.
        """
        frame_RN = frame_RN.masked_fill(eos_RN < 0, -1)
        size = int(frame_RN.max()) + 1
        number_RN = frame_RN.where(frame_RN >= 0, size)
        place_RN = torch.arange(frame_RN.numel(), device=frame_RN.device).view_as(frame_RN)
        key_RN = levels_RN * frame_RN.numel() + place_RN
        ruled = (_beside(rule_RN, number_RN, size) for rule_RN in (content_RN, only_eos_RN))
        return cls(size, number_RN, key_RN, eos_RN, *ruled)

    def decided(self, sample_RN: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
        """content_RN, only_eos_RN, bool: positions whose frame cannot be EOS any more, and those where it must be."""
        decided_RN, eos_RN = (sample_RN >= 0) & (sample_RN != mask_token_id), sample_RN == self.eos_RN
        content_RN = self.content_RN | _beside(decided_RN & ~eos_RN, self.number_RN, self.size)
        only_eos_RN = self.only_eos_RN | _beside(decided_RN & eos_RN, self.number_RN, self.size)
        return content_RN, only_eos_RN & ~content_RN

    def restrict(self, logits_MV: Tensor, content_M: Tensor, only_eos_M: Tensor, eos_M: Tensor) -> Tensor:
        """Logits with -inf at EOS, or at all but EOS. They may be on another device than the rest: nothing waits."""
        for where_M, stays in ((only_eos_M, True), (content_M, False)):
            row_U = torch.nonzero(where_M).flatten()
            if len(row_U):
                row_U, eos_U = (part.to(logits_MV.device, non_blocking=True) for part in (row_U, eos_M[row_U]))
                logits_MV = logits_MV.index_fill(0, row_U, -torch.inf) if stays else logits_MV
                value = logits_MV.new_full((), 0.0 if stays else -torch.inf)
                logits_MV = logits_MV.index_put((row_U, eos_U), value)
        return logits_MV

    def later(self, where_RN: Tensor) -> Tensor:
        """Positions of `where_RN` whose frame has another one there, of a lower level or before it."""
        return where_RN & (self.number_RN < self.size) & (self._first(where_RN) != self.key_RN)

    def follow(self, where_RN: Tensor, sample_RN: Tensor) -> tuple[Tensor, Tensor]:
        """content_RN, only_eos_RN, bool: of the positions `later`, those whose frame's first position in `where_RN` is
        content in `sample_RN`, and those where it is EOS."""
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


def draw_frames(
    frames: Frames,
    sample_RN: Tensor,
    probs_RN: Tensor,
    decide_RN: Tensor,
    logits_MV: Tensor,
    where_RN: Tensor,
    sampling: TokenSampling,
    generator: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor]:
    """Ids and probabilities in which codes that were decided together, each as if it stood alone, follow the first of
    their frame. Those that must be content are drawn again without EOS.

    Args:
        frames: of the table.
        sample_RN, probs_RN: with what was decided.
        decide_RN: bool, the positions that were decided.
        logits_MV, where_RN: what they were drawn from.
        sampling: how they are drawn again.
        generator: one per row.
    """
    content_RN, only_eos_RN = frames.follow(decide_RN, sample_RN)
    sample_RN, probs_RN = sample_RN.where(~only_eos_RN, frames.eos_RN), probs_RN.masked_fill(only_eos_RN, 1.0)
    row_U = torch.nonzero(content_RN[where_RN]).flatten()
    if len(row_U):
        logits_UV = logits_MV[row_U]
        candidates = Candidates(sample_RN[content_RN], torch.log_softmax(logits_UV.double(), -1))
        uniform_U = draw_uniform(content_RN.sum(1).tolist(), 1, generator)[:, 0].to(sample_RN.device)
        place_U = torch.arange(len(row_U), device=row_U.device)
        sampling.sample_content(candidates, place_U, frames.eos_RN[content_RN], logits_UV, uniform_U)
        sample_RN[content_RN] = candidates.content_M
        probs_RN[content_RN] = candidates.content_log_probs_M.exp()
    return sample_RN, probs_RN
