"""The state of a run, and the random numbers that it draws.

Shape suffixes: R rows, N columns, M = some positions, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class State:
    """What a run has decided so far: all that the decoder reads. A sampler that remembers more adds fields.

    Attributes:
        steps: the most steps that the run takes.
        steps_R: int64, K, the most steps that each row takes.
        mask_token_id: V, the local id of an undecided code.
        start_RN: int64, the sample before the first step.
        undecided_RN: bool, the positions that have no token yet.
        levels_RN: int64, residual level of each position.
        block_RN: int64, number of the block that each position is in, -1 at padding; lower ones are decided first.
        probs_RN: float64, the model's probability of each token when it was decided; NaN where undecided.
    """

    steps: int
    steps_R: Tensor
    mask_token_id: int
    start_RN: Tensor
    undecided_RN: Tensor
    levels_RN: Tensor
    block_RN: Tensor
    probs_RN: Tensor

    @classmethod
    def blank(
        cls,
        sample_RN: Tensor,
        levels_RN: Tensor,
        steps_R: Tensor,
        block_RN: Tensor | None = None,
        start_RN: Tensor | None = None,
        draft_RN: Tensor | None = None,
        **more: Any,
    ) -> Self:
        """The state in which nothing is decided, or nothing but a draft.

        Args:
            sample_RN: V at positions to fill in, -1 at padding.
            levels_RN: residual levels.
            steps_R: K of each row.
            block_RN: see `State`; None puts all positions of a row in one block.
            start_RN: see `State`; None starts from `sample_RN`, and from the draft where there is one.
            draft_RN: local ids that count as decided, negative elsewhere; None decides nothing.
            more: fields of a subclass.
        """
        there_RN, draft_RN = sample_RN >= 0, torch.full_like(sample_RN, -1) if draft_RN is None else draft_RN
        block_RN = torch.zeros_like(levels_RN) if block_RN is None else block_RN
        return cls(
            steps=int(steps_R.max()),
            steps_R=steps_R.to(sample_RN.device),
            mask_token_id=int(sample_RN.max()),
            start_RN=sample_RN.where(draft_RN < 0, draft_RN) if start_RN is None else start_RN,
            undecided_RN=there_RN & (draft_RN < 0),
            levels_RN=levels_RN,
            block_RN=block_RN.masked_fill(~there_RN, -1),
            probs_RN=torch.full(sample_RN.shape, torch.nan, dtype=torch.float64, device=sample_RN.device),
            **more,
        )

    @property
    def noise_R(self) -> Tensor:
        """float64: how much noise there is left, the share of undecided positions."""
        there_R = (self.block_RN >= 0).sum(1)
        return self.undecided_RN.sum(1).double() / there_R.clamp_min(1)

    @property
    def decided_RN(self) -> Tensor:
        """bool: the positions that the run has given a token."""
        return ~self.undecided_RN & (self.block_RN >= 0)

    @property
    def current_block_R(self) -> Tensor:
        """Number of each row's first block that has undecided positions; a huge number where none has."""
        far = torch.iinfo(self.block_RN.dtype).max
        return self.block_RN.masked_fill(~self.undecided_RN, far).amin(1)

    @property
    def candidates_RN(self) -> Tensor:
        """bool: the undecided positions of each row's current block."""
        return self.undecided_RN & (self.block_RN == self.current_block_R[:, None])


def noise_at_start(sample_RN: Tensor, draft_RN: Tensor | None, noise_R: Tensor | None) -> Tensor:
    """float64 [R]: how much noise to presume in each row before the first step: the share of codes that are undecided,
    but at least `noise_R`.

    Args:
        sample_RN, draft_RN, noise_R: as `Sampler.start` takes them.
    """
    if draft_RN is None:
        return torch.ones(len(sample_RN), dtype=torch.float64, device=sample_RN.device)
    there_RN = sample_RN >= 0
    share_R = (there_RN & (draft_RN < 0)).sum(1).double() / there_RN.sum(1)
    return share_R if noise_R is None else torch.maximum(share_R, noise_R)


def check_noise(noise_R: Tensor) -> None:
    """Refuse a draft in which a sampler that follows a process would change nothing.

    Args:
        noise_R: of `noise_at_start`.

    Raises:
        ValueError: a draft without undecided codes and without noise.
    """
    if not bool((noise_R > 0).all()):
        raise ValueError(
            "This sampler changes nothing of a complete draft without noise. Give the draft a noise above 0."
        )


def draw_uniform(counts_R: Sequence[int], numbers: int, generator: Sequence[torch.Generator]) -> Tensor:
    """float64 [M, numbers] in [0, 1), on the device of the first generator.

    Args:
        counts_R: how many positions each row has.
        numbers: how many numbers a position takes.
        generator: one per row. A row's numbers come from its own, so they do not depend on other rows.
    """
    rows = [
        torch.rand(count, numbers, generator=g, dtype=torch.float64, device=g.device)
        for count, g in zip(counts_R, generator, strict=True)
    ]
    return torch.cat([row.to(rows[0].device) for row in rows])
