"""diffusers' own schedulers for masked tokens, behind the interface of `MaskSampler`.

Shape suffixes: R rows, N columns, M = positions of `where_RN`, row by row; V local ids.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from diffusers import AmusedScheduler, BlockRefinementScheduler
from torch import Tensor

from multidiff.samplers.frames import Frames
from multidiff.samplers.sampler import STEPS, MaskSampler, SamplerOutput, State, _uniform
from multidiff.samplers.token_sampling import Candidates, check_finite
from multidiff.sequence.vocabulary import SharedVocabulary

Scheduler = AmusedScheduler | BlockRefinementScheduler


@dataclass(frozen=True)
class SchedulerState(State):
    """`State`, with what diffusers keeps in the scheduler itself.

    Attributes:
        schedulers: a copy for each row; the mask token is V.
        round_R: how many steps each row has spent in its block.
    """

    schedulers: tuple[Scheduler, ...]
    round_R: tuple[int, ...]


class SchedulerSampler(MaskSampler):
    """Hands rows to an `AmusedScheduler` (MaskGIT) or a `BlockRefinementScheduler` (LLaDA 2), one at a time.

    Of `MaskSampler`'s settings only those that the pipeline reads have a meaning: steps, guidance and canvas. Codes of
    a frame stop together here too: a decision that contradicts another of the same step is drawn again.
    """

    def __init__(self, scheduler: Scheduler):
        super().__init__()
        self.scheduler = scheduler

    def start(
        self,
        sample_RN: Tensor,
        levels_RN: Tensor,
        coords_RN3: Tensor,
        num_inference_steps: int | None = None,
        eos_RN: Tensor | None = None,
        extent_RN3: Tensor | None = None,
        frame_RN: Tensor | None = None,
    ) -> SchedulerState:
        state = super().start(sample_RN, levels_RN, coords_RN3, num_inference_steps, eos_RN, extent_RN3, frame_RN)
        schedulers, block_RN, steps = [], state.block_RN, num_inference_steps or STEPS
        if isinstance(self.scheduler, BlockRefinementScheduler):
            each = num_inference_steps or self.scheduler.config["num_inference_steps"]
            column_N, block_RN = torch.arange(sample_RN.shape[1], device=sample_RN.device), state.block_RN.clone()
            for row, number in enumerate((sample_RN >= 0).sum(1).tolist()):
                size = min(self.scheduler.config["block_length"], number)
                schedulers.append(copy.deepcopy(self.scheduler))
                schedulers[-1].set_timesteps(each, block_length=size)
                block_RN[row, :number] = column_N[:number] // size
            steps = each * (int(block_RN.max()) + 1)
        else:
            for _ in sample_RN:
                schedulers.append(AmusedScheduler(state.mask_token_id, self.scheduler.config["masking_schedule"]))
                schedulers[-1].set_timesteps(steps)
        changed = replace(state, steps=steps, block_RN=block_RN)
        return SchedulerState(**vars(changed), schedulers=tuple(schedulers), round_R=(0,) * len(sample_RN))

    def needs(self, state: State) -> Tensor:
        assert isinstance(state, SchedulerState)
        where_RN = super().needs(state)
        if (self.scheduler.config.get("editing_threshold") or 0) > 0:
            current_R1 = state.block_RN.where(where_RN, -2).amax(1, keepdim=True)
            where_RN = where_RN | (state.block_RN == current_R1)
        return where_RN

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample_RN: Tensor,
        *,
        where: Tensor,
        state: State,
        generator: Sequence[torch.Generator],
    ) -> SamplerOutput:
        assert isinstance(state, SchedulerState)
        sample_RN, probs_RN, frames = sample_RN.clone(), state.probs_RN.clone(), state.frames
        model_output = model_output.to(sample_RN.device)
        if frames is not None:
            content_RN, only_eos_RN = frames.decided(sample_RN, state.mask_token_id)
            model_output = frames.restrict(model_output, content_RN[where], only_eos_RN[where], state.eos_RN[where])
        p_MV = torch.softmax(model_output.double(), -1)
        check_finite(p_MV[:, 0])
        rounds, first = list(state.round_R), 0
        for row, count in enumerate(where.sum(1).tolist()):
            if not count:
                continue
            logits_MV, chosen_MV = model_output[first : first + count], p_MV[first : first + count]
            first += count
            block = state.block_RN[row][state.undecided_RN[row]].min()
            column_N = torch.nonzero(state.block_RN[row] == block).flatten()
            asked_N = where[row, column_N]
            # Decided positions have no logits: schedulers draw there too, and discard it.
            logits_NV = logits_MV.new_zeros(len(column_N), logits_MV.shape[1])
            logits_NV[asked_N] = logits_MV
            before_N = sample_RN[row, column_N]
            before_1N = cast("torch.LongTensor", before_N[None])
            scheduler = state.schedulers[row]
            if isinstance(scheduler, BlockRefinementScheduler):
                after_1N = scheduler.step(
                    logits_NV[None],
                    rounds[row],
                    before_1N,
                    mask_token_id=state.mask_token_id,
                    generator=generator[row],
                    return_dict=False,
                )[0]
                undecided = bool((after_1N == state.mask_token_id).any())
                rounds[row] = rounds[row] + 1 if undecided else 0
            else:
                after_1N = scheduler.step(
                    logits_NV[None], timestep, before_1N, generator=generator[row], return_dict=False
                )[0]
            sample_RN[row, column_N] = after_1N[0]
            changed_N = (after_1N[0] != before_N) & asked_N
            p_NV = chosen_MV.new_zeros(logits_NV.shape).index_put((asked_N.nonzero()[:, 0],), chosen_MV)
            probs_RN[row, column_N[changed_N]] = p_NV[changed_N].gather(1, after_1N[0][changed_N][:, None])[:, 0]
        if frames is not None:
            sample_RN, probs_RN = self._follow(frames, sample_RN, probs_RN, model_output, where, state, generator)
        undecided_RN = sample_RN == state.mask_token_id
        return SamplerOutput(
            sample_RN, replace(state, undecided_RN=undecided_RN, probs_RN=probs_RN, round_R=tuple(rounds))
        )

    def _follow(
        self,
        frames: Frames,
        sample_RN: Tensor,
        probs_RN: Tensor,
        logits_MV: Tensor,
        where: Tensor,
        state: State,
        generator: Sequence[torch.Generator],
    ) -> tuple[Tensor, Tensor]:
        """Codes decided together follow the first of their frame, drawn again as the scheduler draws."""
        decide_RN = state.undecided_RN & (sample_RN != state.mask_token_id)
        content_RN, only_eos_RN = frames.follow(decide_RN, sample_RN)
        sample_RN, probs_RN = sample_RN.where(~only_eos_RN, state.eos_RN), probs_RN.masked_fill(only_eos_RN, 1.0)
        row_U = torch.nonzero(content_RN[where]).flatten()
        if len(row_U):
            candidates = Candidates(sample_RN[content_RN], torch.log_softmax(logits_MV[row_U].double(), -1))
            temperature = 0.0 if isinstance(self.scheduler, BlockRefinementScheduler) else 1.0
            uniform_U = _uniform(content_RN.sum(1).tolist(), 1, generator)[:, 0].to(sample_RN.device)
            candidates.follow(
                torch.arange(len(row_U), device=row_U.device),
                state.eos_RN[content_RN],
                logits_MV[row_U],
                uniform_U,
                temperature=temperature,
            )
            sample_RN[content_RN], probs_RN[content_RN] = candidates.content_M, candidates.content_log_p_M.exp()
        return sample_RN, probs_RN


class Samplers(Mapping[str, MaskSampler]):
    """The sampler of each tokenizer of a vocabulary; `samplers["image"] = AmusedScheduler(…)` sets one.

    Args:
        vocabulary: its tokenizers.
        given: as `as_sampler` takes them; a tokenizer that is not named gets `MaskSampler()`.

    Raises:
        ValueError: an unknown tokenizer, or something that is no sampler; also when one is set.
    """

    def __init__(self, vocabulary: SharedVocabulary, given: Mapping[str, MaskSampler | Scheduler]):
        self._vocabulary = vocabulary
        self._samplers = {name: MaskSampler() for name in vocabulary.tokenizers}
        for name, sampler in given.items():
            self[name] = sampler

    def __setitem__(self, name: str, sampler: MaskSampler | Scheduler) -> None:
        self._vocabulary.layout(name)
        self._samplers[name] = as_sampler(sampler)

    def __getitem__(self, name: str) -> MaskSampler:
        return self._samplers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._samplers)

    def __len__(self) -> int:
        return len(self._samplers)

    def __repr__(self) -> str:
        return repr(self._samplers)


def as_sampler(sampler: MaskSampler | Scheduler) -> MaskSampler:
    """Whatever may be handed to the pipeline, as a `MaskSampler`.

    Raises:
        ValueError: something else.
    """
    if isinstance(sampler, MaskSampler):
        return sampler
    if isinstance(sampler, Scheduler):
        return SchedulerSampler(sampler)
    raise ValueError(
        "expected a MaskSampler, an AmusedScheduler or a BlockRefinementScheduler, got " + type(sampler).__name__
    )
