"""What the decoder and the pipeline know of a sampler: this, and nothing else.

A sampler fills in the unknown codes of one tokenizer. Its tables have a row for each document that has any, and a
column for each code that was unknown at the start. Ids are local. A masked position holds V, padding holds -1. A
sampler keeps all that changes in a state that the caller holds, so one sampler may serve many runs at once. It owns
no model: the caller computes the logits that it asks for.

    state = sampler.start(sample_RN, levels_RN, coords_RN3, generator=generators)
    sample_RN = state.start_RN
    for timestep in range(state.steps - 1, -1, -1):
        where_RN = sampler.needs(state)
        logits_MV = ...  # of the model, at the positions of where_RN, row by row
        output = sampler.step(logits_MV, timestep, sample_RN, where=where_RN, state=state, generator=generators)
        sample_RN, state = output.prev_sample, output.state

A class of your own needs no base class. It needs the attributes and methods of `Sampler`, and a state with those of
`SamplerState`, for which it may use `multidiff.samplers.State`.

Shape suffixes: R rows, N columns, M = positions of `where_RN`, row by row; V local ids; 3 axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.utils import BaseOutput
from torch import Tensor


class SamplerState(Protocol):
    """What a run has decided so far. A sampler's own state may hold more."""

    @property
    def steps(self) -> int:
        """The most steps that the run takes."""
        ...

    @property
    def steps_R(self) -> Tensor:
        """int64, K: the most steps that each row takes."""
        ...

    @property
    def mask_token_id(self) -> int:
        """V: the local id that stands for an undecided code."""
        ...

    @property
    def undecided_RN(self) -> Tensor:
        """bool: the positions that have no token yet."""
        ...

    @property
    def start_RN(self) -> Tensor:
        """int64: the sample before the first step. Samplers that unmask start from V everywhere."""
        ...

    @property
    def levels_RN(self) -> Tensor:
        """int64: the residual level of each position."""
        ...

    @property
    def block_RN(self) -> Tensor:
        """int64: number of the decoding block of each position, -1 at padding. Lower ones are decided first."""
        ...

    @property
    def probs_RN(self) -> Tensor:
        """float64: the model's probability of each token when it was decided; NaN where undecided."""
        ...

    @property
    def noise_R(self) -> Tensor:
        """float64: how much noise there is left in each row, from 1 to 0, for models with a time input."""
        ...

    @property
    def current_block_R(self) -> Tensor:
        """int64: number of each row's first block that has undecided positions; a huge number where none has."""
        ...


@dataclass
class SamplerOutput(BaseOutput):
    """Result of a step.

    Attributes:
        prev_sample: int64 [R, N], the local ids after the step. diffusers uses this name, because a step leads back
            from more noise to less.
        state: the state after the step.
    """

    prev_sample: Tensor
    state: SamplerState


class Sampler(Protocol):
    """Fills in the unknown codes of one tokenizer, step by step.

    Samplers are honest. A step changes undecided positions only, unless the sampler says that it remasks or edits what
    it has decided itself. After the last step every position is decided. A row takes the same random numbers from its
    own generator whatever rows stand beside it.
    """

    @property
    def is_adaptive(self) -> bool:
        """Whether the sampler finds its own number of steps. Then nobody may ask for a number, and a run ends once
        every position is decided."""
        ...

    @property
    def cache_mode(self) -> str:
        """Which keys and values of the transformer a run keeps: "none"; "approximate_prefix" or "approximate_dual" of
        a model with full attention; "exact" of one whose attention has an order; or "auto", which is "exact" where that
        is possible, else "none"."""
        ...

    @property
    def num_inference_steps(self) -> int | None:
        """K where a run does not say; None leaves it to the sampler."""
        ...

    @property
    def guidance_scale(self) -> float | Mapping[str, float]:
        """Scale of classifier-free guidance where a run does not say; 1 is none. A table {tokenizer: scale} guides by
        each tokenizer's given segments."""
        ...

    @property
    def canvas(self) -> Mapping[str, int] | None:
        """Size of a blank where a request does not say; None leaves it to the tokenizer."""
        ...

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
    ) -> SamplerState:
        """The state before the first step.

        A sampler also serves models whose attention has an order if it takes one argument more, `block_RN`: int64, the
        number of the block of attention that each position is in, -1 at padding. Each block must then be finished
        before a higher one starts, and an EOS ends the work: positions of later blocks are EOS as well.

        A sampler that revises what it has decided also goes on from drafts if it takes `draft_RN`, int64, the local id
        at each position that counts as decided, negative elsewhere; and `noise_R`, float64, how much noise it must at
        least presume in each row.

        Args:
            sample_RN: int64, V at positions to fill in, -1 at padding, which follows them.
            levels_RN: int64, residual levels.
            coords_RN3: int64, coordinates.
            num_inference_steps: K; None takes the sampler's own.
            eos_RN: int64, the local id of EOS at each position, -1 where the content cannot end; None where its length
                does not vary.
            extent_RN3: int64, how far the coordinates of each position's segment extend; None takes those of the row.
            frame_RN: int64, number of the frame that each position is in, over all rows, from 0; negative where it is
                in none. The codes of a frame must all be EOS or all be content. None where every code stands alone.
            sizes_RN: int64, how many ids each position has, where residual levels differ in it; None where all have V.
            generator: one per row.

        Raises:
            ValueError: settings that do not fit these positions.
        """
        ...

    def needs(self, state: Any) -> Tensor:
        """where_RN, bool: the positions whose logits the next step reads.

        Args:
            state: what `start` or the step before returned.
        """
        ...

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample_RN: Tensor,
        *,
        where: Tensor,
        state: Any,
        generator: Sequence[torch.Generator],
    ) -> SamplerOutput:
        """Decide some of the undecided positions.

        Args:
            model_output: logits_MV at the positions of `where`, row by row; -inf at ids that cannot be. They may be on
                another device than the tables.
            timestep: `state.steps` - 1 at the first step, 0 at the last.
            sample_RN: int64, local ids; V where undecided, -1 at padding.
            where: what `needs` returned.
            state: what `start` or the step before returned.
            generator: one per row.
        """
        ...

    def guidance_at(self, scale: float, step: int, state: Any) -> Tensor:
        """scale_R, float64: the guidance scale of each row at a step, after the sampler's guidance schedule.

        Args:
            scale: the scale that was asked for.
            step: k, from 0.
            state: what `start` or the step before returned.
        """
        ...
