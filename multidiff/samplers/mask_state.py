"""`MaskState`: what a `MaskSampler` remembers, how a run starts, and what is known of its next step.

Shape suffixes: R rows, N columns, K steps, U positions that are no padding, row by row; 3 axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from multidiff.samplers.frames import Frames
from multidiff.samplers.parts import Parts
from multidiff.samplers.state import State, check_noise, draw_uniform, noise_at_start
from multidiff.samplers.unmasking import STEPS


@dataclass(frozen=True, kw_only=True)
class MaskState(State):
    """`State`, with what a `MaskSampler` remembers.

    Attributes:
        coords_RN3: int64, coordinates.
        eos_RN: int64, local id of EOS at each position; -1 where the content cannot end.
        frames: which positions are EOS or content together; None where each stands alone.
        score_RN: float64, the part of the order's score that is known at the start.
        plan_RK: int64, how many positions a schedule decides at each step; no columns under other rules.
        next_RN: bool, the positions that the next step decides; None where that depends on their logits.
        remask_RN: bool, the decided positions that the next step masks again.
        draft_R: bool, the rows that go on from a draft.
        presumed_R: float64, how much noise the run presumes at least; 0 in rows without a draft.
        time_R: float64, the time that the reverse process starts from; 1 unless the run goes on from a draft.
        ends: whether the blocks are those of the model's attention, so that nothing after an EOS is needed.
    """

    coords_RN3: Tensor
    eos_RN: Tensor
    frames: Frames | None
    score_RN: Tensor
    plan_RK: Tensor
    next_RN: Tensor | None
    remask_RN: Tensor
    draft_R: Tensor
    presumed_R: Tensor
    time_R: Tensor
    ends: bool

    @property
    def noise_R(self) -> Tensor:
        return torch.maximum(super().noise_R, self.presumed_R)

    @classmethod
    def first(
        cls,
        parts: Parts,
        sample_RN: Tensor,
        levels_RN: Tensor,
        coords_RN3: Tensor,
        num_inference_steps: int | None,
        eos_RN: Tensor | None,
        extent_RN3: Tensor | None,
        frame_RN: Tensor | None,
        block_RN: Tensor | None,
        draft_RN: Tensor | None,
        noise_R: Tensor | None,
        generator: Sequence[torch.Generator],
    ) -> MaskState:
        """The state before the first step; see `Sampler.start`."""
        there_RN = undecided_RN = sample_RN >= 0
        parts.rules.check_codes(int(sample_RN.max()), int(there_RN.sum(1).max()), varies=eos_RN is not None)
        if draft_RN is not None:
            undecided_RN = there_RN & (draft_RN < 0)
            parts.check_draft(complete=not bool(undecided_RN.any(1).all()))
        noise_R = noise_at_start(sample_RN, draft_RN, noise_R)
        if parts.remasking.masks_again:
            check_noise(noise_R)
        numbers = undecided_RN.sum(1).tolist()
        if extent_RN3 is None:
            extent_RN3 = (coords_RN3.amax(1, keepdim=True) + 1).expand_as(coords_RN3)
        eos_RN = torch.full_like(sample_RN, -1) if eos_RN is None else eos_RN
        frames = None
        if frame_RN is not None:
            frames = Frames.of(frame_RN, levels_RN, eos_RN, *parts.rules.frame_rules(sample_RN, coords_RN3, eos_RN))
            if bool((frames.content_RN & frames.only_eos_RN).any()):
                raise parts.rules.nothing_left("in a frame, whose codes must all be EOS or all content")
        ends = block_RN is not None
        if block_RN is None:
            block_RN = parts.blocks.numbers(there_RN, levels_RN)
        open_RN = block_RN.masked_fill(~undecided_RN, -1)
        sizes = [[size for size in block_N[block_N >= 0].bincount().tolist() if size] for block_N in open_RN.cpu()]
        draft_R = (there_RN & ~undecided_RN).any(1)
        plans: list[list[int]] = [[] for _ in numbers]
        if parts.unmasking.is_adaptive:
            if num_inference_steps is not None:
                raise ValueError(
                    f"num_inference_steps {num_inference_steps}, but unmasking {parts.unmasking.unmasking!r} finds the "
                    "number of steps itself"
                )
            steps = numbers
        else:
            asked = num_inference_steps or parts.unmasking.num_inference_steps
            usual = [sum(min(size, STEPS) for size in row) if ends else STEPS for row in sizes]
            steps = [asked or most for most in usual]
        if parts.unmasking.is_scheduled:
            deciding = [min(most, number) for most, number in zip(steps, numbers, strict=True)]
            for row_sizes, row_steps in zip(sizes, deciding, strict=True):
                if row_steps < len(row_sizes):
                    blocks = "the model's attention" if ends else f"block_length {parts.blocks.block_length!r}"
                    raise ValueError(
                        f"num_inference_steps {row_steps} is less than the {len(row_sizes)} blocks of {blocks}. "
                        "Give at least as many, or leave it out."
                    )
            plans = [parts.unmasking.plan(*row) if row[0] else [] for row in zip(sizes, deciding, strict=True)]
            if parts.remasking.edits:  # a draft is edited when nothing is left to decide, too
                deciding = [
                    most if draft else few for most, few, draft in zip(steps, deciding, draft_R.tolist(), strict=True)
                ]
            steps = deciding
        longest = max(steps) if parts.unmasking.is_scheduled else 0
        state = cls.blank(
            sample_RN,
            levels_RN,
            torch.tensor(steps),
            block_RN,
            draft_RN=draft_RN,
            coords_RN3=coords_RN3,
            eos_RN=eos_RN,
            frames=frames,
            score_RN=parts.order.fixed_scores(there_RN, levels_RN, coords_RN3, extent_RN3, generator),
            plan_RK=torch.tensor([plan + [0] * (longest - len(plan)) for plan in plans]).to(sample_RN.device),
            next_RN=None,
            remask_RN=torch.zeros_like(undecided_RN),
            draft_R=draft_R,
            presumed_R=torch.where(draft_R, noise_R, 0.0),
            time_R=parts.remasking.time(noise_R),
            ends=ends,
        )
        return state.look_ahead(parts, 0, generator)

    def behind_eos(self, sample_RN: Tensor, undecided_RN: Tensor) -> Tensor:
        """bool: the undecided positions of blocks after one that holds an EOS. Those of a frame that is content stay
        undecided."""
        eos_RN = (self.eos_RN >= 0) & (sample_RN == self.eos_RN) & ~undecided_RN
        far = torch.iinfo(self.block_RN.dtype).max
        end_R1 = self.block_RN.masked_fill(~eos_RN, far).amin(1, keepdim=True)
        rest_RN = undecided_RN & (self.block_RN > end_R1) & (self.eos_RN >= 0)
        if self.frames is not None:
            content_RN, _ = self.frames.decided(sample_RN, self.mask_token_id)
            rest_RN = rest_RN & ~content_RN
        return rest_RN

    def look_ahead(self, parts: Parts, index: int, generator: Sequence[torch.Generator]) -> MaskState:
        """This state with what step `index` decides and masks again, as far as no logits are needed to know it."""
        nothing_RN = torch.zeros_like(self.undecided_RN)
        if index == self.steps:
            return replace(self, next_RN=nothing_RN, remask_RN=nothing_RN)
        if parts.unmasking.unmasking == "ancestral":
            there_RN = self.block_RN >= 0
            uniform_U = draw_uniform(there_RN.sum(1).tolist(), 1, generator)[:, 0].to(there_RN.device)
            uniform_RN = torch.ones_like(self.probs_RN).masked_scatter(there_RN, uniform_U)
            next_RN, remask_RN = parts.remasking.transition(
                index, self.steps_R, self.time_R, self.undecided_RN, self.probs_RN, uniform_RN
            )
            return replace(self, next_RN=next_RN, remask_RN=remask_RN)
        if parts.order.is_known_beforehand:
            score_RN = self.score_RN.masked_fill(~self.candidates_RN, -torch.inf)
            return replace(self, next_RN=highest(score_RN, self.plan_RK[:, index]))
        return self


def highest(score_RN: Tensor, count_R: Tensor) -> Tensor:
    """bool: the count_R highest scores of each row that are not -inf; among equals the first."""
    order_RN = score_RN.argsort(dim=1, descending=True, stable=True)
    rank_RN = torch.empty_like(order_RN)
    columns_RN = torch.arange(order_RN.shape[1], device=order_RN.device).expand_as(order_RN)
    return (rank_RN.scatter(1, order_RN, columns_RN) < count_R[:, None]) & ~score_RN.isneginf()
