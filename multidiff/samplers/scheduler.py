"""diffusers' own schedulers for masked tokens, as samplers.

Shape suffixes: R rows, N columns, M = positions of `where_RN`, row by row, U some of them; V local ids; 1 one row.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from diffusers import AmusedScheduler, BlockRefinementScheduler
from torch import Tensor

from multidiff.samplers.frames import Frames, draw_frames
from multidiff.samplers.guidance import Guidance
from multidiff.samplers.protocol import SamplerOutput
from multidiff.samplers.state import State
from multidiff.samplers.token_sampling import TokenSampling, check_finite
from multidiff.samplers.unmasking import STEPS

Scheduler = AmusedScheduler | BlockRefinementScheduler


@dataclass(frozen=True, kw_only=True)
class SchedulerState(State):
    """`State`, with what diffusers keeps in the scheduler itself.

    Attributes:
        eos_RN: int64, local id of EOS at each position; -1 where the content cannot end.
        frames: which positions are EOS or content together; None where each stands alone.
        schedulers: a copy for each row; its mask token is V.
        round_R: how many steps each row has spent in its block.
    """

    eos_RN: Tensor
    frames: Frames | None
    schedulers: tuple[Scheduler, ...]
    round_R: tuple[int, ...]


class SchedulerSampler:
    """Hands rows to an `AmusedScheduler` (MaskGIT) or a `BlockRefinementScheduler` (LLaDA 2), one at a time.

    The codes of a frame are all EOS or all content here too: a decision that contradicts another one of the same step
    is drawn again.

    Args:
        scheduler: its settings are used. It is copied for every run and keeps no state of one.
    """

    is_adaptive = False
    cache_mode = "none"
    canvas: Mapping[str, int] | None = None

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self._guidance = Guidance()

    def __repr__(self) -> str:
        return f"SchedulerSampler({self.scheduler!r})"

    @property
    def num_inference_steps(self) -> int | None:
        return self.scheduler.config.get("num_inference_steps")

    @property
    def guidance_scale(self) -> float | Mapping[str, float]:
        return self._guidance.guidance_scale

    def guidance_at(self, scale: float, step: int, state: State) -> Tensor:
        return self._guidance.scale_at(scale, step, state.steps_R)

    def start(
        self,
        sample_RN: Tensor,
        levels_RN: Tensor,
        coords_RN3: Tensor,
        *,
        num_inference_steps: int | None = None,
        eos_RN: Tensor | None = None,
        extent_RN3: Tensor | None = None,
        frame_RN: Tensor | None = None,
        sizes_RN: Tensor | None = None,
        generator: Sequence[torch.Generator],
    ) -> SchedulerState:
        """The state before the first step; see `Sampler.start`.

        An `AmusedScheduler` takes K steps for a row, or as many as the row has positions if these are fewer. A
        `BlockRefinementScheduler` takes K for each block.
        """
        mask_token_id, steps = int(sample_RN.max()), num_inference_steps or self.num_inference_steps or STEPS
        schedulers, steps_R, block_RN = [], [], torch.zeros_like(sample_RN)
        for row, number in enumerate((sample_RN >= 0).sum(1).tolist()):
            if isinstance(self.scheduler, BlockRefinementScheduler):
                size = min(self.scheduler.config["block_length"], number)
                scheduler = copy.deepcopy(self.scheduler)
                scheduler.set_timesteps(steps, block_length=size)
                block_RN[row] = torch.arange(sample_RN.shape[1], device=sample_RN.device) // size
                steps_R.append(steps * -(-number // size))
            else:
                scheduler = AmusedScheduler(mask_token_id, self.scheduler.config["masking_schedule"])
                steps_R.append(min(steps, number))
                scheduler.set_timesteps(steps_R[-1])
            schedulers.append(scheduler)
        eos_RN = torch.full_like(sample_RN, -1) if eos_RN is None else eos_RN
        nothing_RN = torch.zeros_like(sample_RN, dtype=torch.bool)
        return SchedulerState.blank(
            sample_RN,
            levels_RN,
            torch.tensor(steps_R),
            block_RN,
            eos_RN=eos_RN,
            frames=None if frame_RN is None else Frames.of(frame_RN, levels_RN, eos_RN, nothing_RN, nothing_RN),
            schedulers=tuple(schedulers),
            round_R=(0,) * len(sample_RN),
        )

    def needs(self, state: SchedulerState) -> Tensor:
        where_RN = state.candidates_RN
        if (self.scheduler.config.get("editing_threshold") or 0) > 0:
            where_RN = where_RN | (state.block_RN == state.current_block_R[:, None])
        return where_RN

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample_RN: Tensor,
        *,
        where: Tensor,
        state: SchedulerState,
        generator: Sequence[torch.Generator],
    ) -> SamplerOutput:
        sample_RN, probs_RN, frames = sample_RN.clone(), state.probs_RN.clone(), state.frames
        model_output = model_output.to(sample_RN.device)
        if frames is not None:
            content_RN, only_eos_RN = frames.decided(sample_RN, state.mask_token_id)
            model_output = frames.restrict(model_output, content_RN[where], only_eos_RN[where], state.eos_RN[where])
        p_MV = torch.softmax(model_output.double(), -1)
        check_finite(p_MV[:, 0])
        rounds, first, blocks = list(state.round_R), 0, state.current_block_R.tolist()
        for row, count in enumerate(where.sum(1).tolist()):
            if not count:
                continue
            logits_MV, probs_MV = model_output[first : first + count], p_MV[first : first + count]
            first += count
            column_N = torch.nonzero(state.block_RN[row] == blocks[row]).flatten()
            asked_N = where[row, column_N]
            # Decided positions have no logits. Schedulers draw there too, and discard it.
            logits_NV = logits_MV.new_zeros(len(column_N), logits_MV.shape[1])
            logits_NV[asked_N] = logits_MV
            before_N = sample_RN[row, column_N]
            after_N = self._step_row(logits_NV, before_N, row, rounds[row], state, generator[row])
            undecided = bool((after_N == state.mask_token_id).any())
            rounds[row] = rounds[row] + 1 if undecided else 0
            sample_RN[row, column_N] = after_N
            changed_N = (after_N != before_N) & asked_N
            probs_NV = probs_MV.new_zeros(logits_NV.shape).index_put((asked_N.nonzero()[:, 0],), probs_MV)
            probs_RN[row, column_N[changed_N]] = probs_NV[changed_N].gather(1, after_N[changed_N][:, None])[:, 0]
        if frames is not None:
            decide_RN = state.undecided_RN & (sample_RN != state.mask_token_id)
            sampling = TokenSampling(0.0 if isinstance(self.scheduler, BlockRefinementScheduler) else 1.0)
            tables = (sample_RN, probs_RN, decide_RN, model_output, where)
            sample_RN, probs_RN = draw_frames(frames, *tables, sampling, generator)
        undecided_RN = sample_RN == state.mask_token_id
        return SamplerOutput(
            sample_RN, replace(state, undecided_RN=undecided_RN, probs_RN=probs_RN, round_R=tuple(rounds))
        )

    def _step_row(
        self,
        logits_NV: Tensor,
        before_N: Tensor,
        row: int,
        round_: int,
        state: SchedulerState,
        generator: torch.Generator,
    ) -> Tensor:
        """The ids of a row's block after the scheduler's step."""
        scheduler, before_1N = state.schedulers[row], cast("torch.LongTensor", before_N[None])
        if isinstance(scheduler, BlockRefinementScheduler):
            output = scheduler.step(
                logits_NV[None],
                round_,
                before_1N,
                mask_token_id=state.mask_token_id,
                generator=generator,
                return_dict=False,
            )
        else:
            timestep = int(state.steps_R[row]) - 1 - round_
            output = scheduler.step(logits_NV[None], timestep, before_1N, generator=generator, return_dict=False)
        return output[0][0]
