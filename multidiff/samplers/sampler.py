"""`MaskSampler`: unmasking of one tokenizer's codes, composed of order, count and choice.

One row per document, one column per code that was unknown at the start, local ids, V the largest level's span. A
masked position holds V, padding -1. All that changes lives in `State`, so one sampler may serve many runs at once.

Shape suffixes: R rows, N columns, M = positions of `where_RN`, row by row; V local ids, 3 axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Self

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from multidiff.samplers.choice import choose
from multidiff.samplers.count import COUNTS
from multidiff.samplers.order import ORDERS


@dataclass(frozen=True)
class State:
    """What a run has decided so far.

    Attributes:
        steps: number of steps of the run.
        steps_R: K, the steps of each row: no more than it has positions.
        mask_token_id: V.
        initial_R: n₀, positions unknown at the start.
        undecided_RN: bool.
        levels_RN, coords_RN3: level and coordinates of each position.
    """

    steps: int
    steps_R: Tensor
    mask_token_id: int
    initial_R: Tensor
    undecided_RN: Tensor
    levels_RN: Tensor
    coords_RN3: Tensor


@dataclass
class SamplerOutput(BaseOutput):
    """Result of a step.

    Attributes:
        prev_sample: sample_RN after the step.
        state: the state after the step.
    """

    prev_sample: Tensor
    state: State


class MaskSampler(SchedulerMixin, ConfigMixin):
    """Decides masked positions step by step; what is decided stays.

    With `order="random"`, `count="linear"` and a step for every position it is the exact ancestral process: each draw
    comes from the model's own conditional. `order="confidence"`, `count="cosine"` is MaskGIT.

    Args:
        order: "random" or "confidence".
        count: "linear" or "cosine".
        temperature: of the token draw; 0 is greedy.
        top_p: nucleus of the token draw, in (0, 1].
        order_temperature: τ of the noise τ (1 - (k + 1)/K) · Gumbel on the confidence; 0 is none.
        num_inference_steps: K, where a run does not say.
        guidance_scale: of classifier-free guidance, where a run does not say; 1 is none.
        canvas: size of a blank, where a run does not say; None is the tokenizer's default.
    """

    config_name = "sampler_config.json"
    order = 1  # diffusers: one forward pass a step

    @register_to_config
    def __init__(
        self,
        order: str = "confidence",
        count: str = "cosine",
        temperature: float = 1.0,
        top_p: float = 1.0,
        order_temperature: float = 0.0,
        num_inference_steps: int = 16,
        guidance_scale: float = 1.0,
        canvas: dict[str, int] | None = None,
    ):
        if order not in ORDERS or count not in COUNTS:
            raise ValueError(
                f"sampler: order {order!r} must be one of {', '.join(ORDERS)}; count {count!r} of {', '.join(COUNTS)}"
            )
        if temperature < 0 or not 0 < top_p <= 1 or order_temperature < 0 or num_inference_steps < 1:
            raise ValueError(
                f"sampler: temperature {temperature} and order_temperature {order_temperature} must be at least 0, "
                f"top_p {top_p} in (0, 1], num_inference_steps {num_inference_steps} at least 1"
            )
        if order == "random" and order_temperature:
            raise ValueError("sampler: order_temperature adds noise to order='confidence'; order='random' has none")
        self.set_timesteps(num_inference_steps)

    @classmethod
    def from_settings(cls, settings: dict[str, Any], where: str) -> Self:
        """A sampler from plain settings, as in `samplers.json`.

        Raises:
            ValueError: an unknown key (the message names the nearest) or a bad value; names `where`.
        """
        known = cls._get_init_keys(cls) - {"self"}
        for key in settings:
            if key not in known:
                near = get_close_matches(key, known, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
                raise ValueError(f"{where}: no sampler setting is called {key!r}; {hint}")
        try:
            return cls(**settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None

    @property
    def settings(self) -> dict[str, Any]:
        """Plain settings; `from_settings` takes them back."""
        return {key: value for key, value in self.config.items() if not key.startswith("_")}

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """diffusers' convention: `timesteps` counts down to 0."""
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)

    def start(self, sample_RN: Tensor, levels_RN: Tensor, coords_RN3: Tensor, num_inference_steps: int) -> State:
        """The state before the first step; V is read off `sample_RN`, where every position is V or -1."""
        undecided_RN = sample_RN >= 0
        initial_R = undecided_RN.sum(1)
        return State(
            steps=num_inference_steps,
            steps_R=initial_R.clamp(1, num_inference_steps),
            mask_token_id=int(sample_RN.max()),
            initial_R=initial_R,
            undecided_RN=undecided_RN,
            levels_RN=levels_RN,
            coords_RN3=coords_RN3,
        )

    def needs(self, state: State) -> Tensor:
        """where_RN: the positions whose logits the next step reads."""
        return state.undecided_RN

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
        """Decide some of the undecided positions.

        Args:
            model_output: logits_MV at the positions of `where`; -inf at ids that cannot be.
            timestep: K - 1 at the first step, 0 at the last.
            sample_RN: local ids; V where undecided, -1 at padding.
            where: what `needs` returned.
            state: what the step before returned.
            generator: one per row. A row takes the same numbers from its own whatever rows stand beside it.
        """
        index = state.steps - 1 - int(timestep)
        counts_R = where.sum(1).tolist()
        draws_M2 = _uniform(counts_R, generator, sample_RN.device)
        choice = choose(model_output, draws_M2[:, 0], self.config["temperature"], self.config["top_p"])
        left_R = (1 - (index + 1) / state.steps_R.double()).clamp_min(0)
        noise_M = (self.config["order_temperature"] * left_R)[:, None].expand(where.shape)[where]
        score_RN = torch.full(where.shape, -torch.inf, dtype=torch.float64, device=sample_RN.device)
        score_RN[where] = ORDERS[self.config["order"]](choice, draws_M2[:, 1], noise_M)
        undecided_R = state.undecided_RN.sum(1)
        decide_R = undecided_R - COUNTS[self.config["count"]](index, state.steps_R, state.initial_R, undecided_R)
        token_RN = sample_RN.clone()
        token_RN[where] = choice.token_M
        decide_RN = _highest(score_RN, decide_R) & state.undecided_RN
        sample_RN = torch.where(decide_RN, token_RN, sample_RN)
        return SamplerOutput(sample_RN, replace(state, undecided_RN=state.undecided_RN & ~decide_RN))


def _uniform(counts_R: Sequence[int], generator: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """float64 [M, 2]: each row's numbers from that row's generator, on the generator's device."""
    rows = [
        torch.rand(count, 2, generator=g, dtype=torch.float64, device=g.device)
        for count, g in zip(counts_R, generator, strict=True)
    ]
    return torch.cat([row.to(device) for row in rows])


def _highest(score_RN: Tensor, count_R: Tensor) -> Tensor:
    """bool: the count_R highest scores of each row; among equals the first."""
    order_RN = score_RN.argsort(dim=1, descending=True, stable=True)
    rank_RN = torch.empty_like(order_RN)
    columns_RN = torch.arange(order_RN.shape[1], device=order_RN.device).expand_as(order_RN)
    return rank_RN.scatter(1, order_RN, columns_RN) < count_R[:, None]
