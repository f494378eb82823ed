"""`MaskSampler`: unmasking of one tokenizer's codes, composed of order, unmasking, token sampling and remasking.

One row per document, one column per code that was unknown at the start, local ids, V the largest level's span. A
masked position holds V, padding -1. All that changes lives in `State`, so one sampler may serve many runs at once.
Codes that share a unit of varying length stop together or not at all (`multidiff.samplers.frames`).

Shape suffixes: R rows, N columns, K steps, M = positions of `where_RN`, row by row; V local ids, 3 axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import accumulate, pairwise
from typing import Any, Literal, Self

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from multidiff.samplers.frames import Frames
from multidiff.samplers.order import BY_MODEL, BY_PLACE
from multidiff.samplers.remasking import POSTERIOR, alphas, sigma
from multidiff.samplers.settings import check_ids, check_settings, is_place
from multidiff.samplers.token_sampling import Candidates, check_finite, gumbel, sample_tokens
from multidiff.samplers.unmasking import ADAPTIVE, SCHEDULES

STEPS = 16  # where nothing says
RULES = ("suppress_tokens", "forced_tokens", "min_length", "max_length")  # what may leave nothing to draw
_LOOP = (0.55, 0.05, 0.9)  # ReMDM's own


@dataclass(frozen=True)
class State:
    """What a run has decided so far.

    Attributes:
        steps: the most steps that the run takes.
        steps_R: K, the steps of each row: no more than it has positions.
        mask_token_id: V.
        undecided_RN: bool.
        levels_RN, coords_RN3: level and coordinates of each position.
        eos_RN: the id at each position that says that the content ends before it; -1 where none does.
        frames: which positions stop together; None where each stops by itself.
        block_RN: number of the block that each position is in; lower ones are decided first.
        place_RN: score of each position in an order that follows from where it stands; 0 in others.
        decide_RK: how many positions a schedule decides at each step; empty under other rules.
        probs_RN: float64, probability of each token when it was decided; NaN where undecided.
    """

    steps: int
    steps_R: Tensor
    mask_token_id: int
    undecided_RN: Tensor
    levels_RN: Tensor
    coords_RN3: Tensor
    eos_RN: Tensor
    frames: Frames | None
    block_RN: Tensor
    place_RN: Tensor
    decide_RK: Tensor
    probs_RN: Tensor


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
    """Decides masked positions step by step.

    With `order="random"`, `unmasking="linear"` and a step for every position it is the exact ancestral process: each
    draw comes from the model's own conditional. `order="confidence"`, `unmasking="cosine"` is MaskGIT.

    Args:
        order: which positions are next. By what the model thinks: "random", "confidence", "margin", "entropy". By
            where they stand: "left_to_right" (text, sound), "row_scan", "halton" (pictures).
        order_temperature: τ of the noise τ (1 - (k + 1)/K) · Gumbel on the order's score; 0 is none.
        level_penalty: taken off the score for each residual level, so that coarse codes come first; 0 is none.
        block_length: decide in blocks of so many codes, each whole before the next; "level": each residual level whole
            before the next; None: all at once.
        cache: "none"; "approximate_dual": within a block only its own codes are computed anew, all else keeps the keys
            and values that it had at the block's first step; "approximate_prefix": what follows the block is computed
            anew as well (Fast-dLLM). All samplers of a run need the same.
        unmasking: how many positions a step. Schedules: "linear", "cosine", "arccos", "power". Adaptive: "threshold",
            "factor" (order "confidence") and "entropy_bound" (order "entropy"). "ancestral": each position by itself
            with the probability of the reverse process (order "random").
        exponent: p of unmasking "power".
        threshold: least probability of unmasking "threshold", in [0, 1].
        factor: f of unmasking "factor".
        entropy_bound: γ of unmasking "entropy_bound", nats.
        remask: "none": what is decided stays. "cap", "rescale", "conf", "loop": ReMDM's (unmasking "ancestral").
            "edit": a decided token is replaced where the model is sure of another.
        eta: η of "cap", "rescale" and "loop", in [0, 1].
        loop: [t_on, t_off, α] of "loop": α stays at that value from t_on to t_off.
        editing_threshold: probability above which "edit" replaces, in [0, 1].
        temperature: of the token draw; 0 is greedy.
        top_k, top_p, typical_p: truncations of the token draw, in this order; see `token_sampling.sample_tokens`.
        draw: "inverse" inverts the cumulative distribution at one number a position; "gumbel" adds one Gumbel variable
            a token. The same distribution; the first is faster, the second is LLaDA's.
        suppress_tokens: local ids that are never drawn.
        forced_tokens: local id by place among the codes to fill in, from 0, through all segments of the tokenizer.
        min_length, max_length: of content whose length varies, in its unit (tokens, frames).
        repetition_penalty: multiplies the log-probability of ids that this run has decided in the document, level by
            level; 1 is none.
        num_inference_steps: K, where a run does not say; None is 16, or as many as an adaptive unmasking takes.
        guidance_scale: of classifier-free guidance, where a run does not say; 1 is none. One for all given segments,
            or {tokenizer: scale}, each with that tokenizer's given segments masked.
        guidance_schedule: "constant"; "linear": from 1 at the first step to the scale at the last; [first, last]: only
            while the share of steps done is in this interval.
        canvas: size of a blank, where a run does not say; None is the tokenizer's default.
    """

    config_name = "sampler_config.json"
    order = 1  # diffusers: one forward pass a step

    @register_to_config
    def __init__(
        self,
        order: str = "confidence",
        order_temperature: float = 0.0,
        level_penalty: float = 0.0,
        block_length: int | Literal["level"] | None = None,
        cache: str = "none",
        unmasking: str = "cosine",
        exponent: float | None = None,
        threshold: float | None = None,
        factor: float | None = None,
        entropy_bound: float | None = None,
        remask: str = "none",
        eta: float | None = None,
        loop: Sequence[float] | None = None,
        editing_threshold: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        typical_p: float = 1.0,
        draw: str = "inverse",
        suppress_tokens: Sequence[int] | None = None,
        forced_tokens: Mapping[int, int] | None = None,
        min_length: int | None = None,
        max_length: int | None = None,
        repetition_penalty: float = 1.0,
        num_inference_steps: int | None = None,
        guidance_scale: float | Mapping[str, float] = 1.0,
        guidance_schedule: str | Sequence[float] = "constant",
        canvas: dict[str, int] | None = None,
    ):
        check_settings(dict(self.config))
        self.set_timesteps(num_inference_steps or STEPS)

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
            forced = settings.get("forced_tokens")
            if isinstance(forced, Mapping) and all(map(is_place, forced)):  # JSON has no keys but text
                settings = {**settings, "forced_tokens": {int(place): token for place, token in forced.items()}}
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

    def start(
        self,
        sample_RN: Tensor,
        levels_RN: Tensor,
        coords_RN3: Tensor,
        num_inference_steps: int | None = None,
        eos_RN: Tensor | None = None,
        extent_RN3: Tensor | None = None,
        frame_RN: Tensor | None = None,
    ) -> State:
        """The state before the first step; V is read off `sample_RN`, where every position is V or -1.

        Args:
            sample_RN, levels_RN, coords_RN3: ids, levels and coordinates.
            num_inference_steps: K; None takes the settings'.
            eos_RN: see `State`; None where length does not vary.
            extent_RN3: how far the coordinates of each position's segment extend; None takes those of the row.
            frame_RN: number of the frame that each position is in, over all rows, from 0, negative where in none; codes
                of a frame stop together (`multidiff.samplers.frames`). None where each stops by itself.

        Raises:
            ValueError: settings that do not fit these positions.
        """
        settings = self.config
        undecided_RN = sample_RN >= 0
        mask_token_id = int(sample_RN.max())
        numbers = undecided_RN.sum(1).tolist()
        check_ids(settings, mask_token_id, max(numbers), ends=eos_RN is not None)
        if extent_RN3 is None:
            extent_RN3 = (coords_RN3.amax(1, keepdim=True) + 1).expand_as(coords_RN3)
        frames = None
        if frame_RN is not None:
            assert eos_RN is not None
            ruled = self._ruled_out(sample_RN, coords_RN3, eos_RN)
            frames = Frames.of(frame_RN.masked_fill(eos_RN < 0, -1), levels_RN, eos_RN, *ruled)
            if bool((frames.content_RN & frames.only_eos_RN).any()):
                raise ValueError(self._nothing_left("in a frame, whose codes stop together"))
        block_RN = _blocks(settings["block_length"], undecided_RN, levels_RN)
        steps = num_inference_steps or settings["num_inference_steps"] or STEPS
        plans: list[list[int]] = [[] for _ in numbers]
        if settings["unmasking"] in SCHEDULES:
            plans = [self._plan(block_N[:n], min(steps, n)) for block_N, n in zip(block_RN.cpu(), numbers, strict=True)]
            steps = max(map(len, plans))
        elif settings["unmasking"] in ADAPTIVE:
            steps = max(numbers)
        longest = max(map(len, plans))
        decide_RK = torch.tensor([plan + [0] * (longest - len(plan)) for plan in plans])
        place_RN = torch.zeros(sample_RN.shape, dtype=torch.float64)
        if settings["order"] in BY_PLACE:
            for row, number in enumerate(numbers):
                rank_N = BY_PLACE[settings["order"]](coords_RN3[row, :number].cpu(), extent_RN3[row, :number].cpu())
                place_RN[row, :number] = -rank_N.double()
        device = sample_RN.device
        return State(
            steps=steps,
            steps_R=torch.tensor([len(plan) or steps for plan in plans], device=device),
            mask_token_id=mask_token_id,
            undecided_RN=undecided_RN,
            levels_RN=levels_RN,
            coords_RN3=coords_RN3,
            eos_RN=torch.full_like(sample_RN, -1) if eos_RN is None else eos_RN,
            frames=frames,
            block_RN=block_RN,
            place_RN=place_RN.to(device),
            decide_RK=decide_RK.to(device),
            probs_RN=torch.full(sample_RN.shape, torch.nan, dtype=torch.float64, device=device),
        )

    def _ruled_out(self, sample_RN: Tensor, coords_RN3: Tensor, eos_RN: Tensor) -> tuple[Tensor, Tensor]:
        """Where settings rule out the stop, and where they rule out all else."""
        settings, length_RN = self.config, coords_RN3[..., 0]
        forbidden = torch.tensor(
            sorted(set(settings["suppress_tokens"] or ())), dtype=torch.int64, device=eos_RN.device
        )
        content_RN = torch.isin(eos_RN, forbidden)
        only_eos_RN = (
            torch.searchsorted(forbidden, eos_RN.contiguous()) == eos_RN
        )  # as many below the stop as there are
        if settings["min_length"] is not None:
            content_RN = content_RN | (length_RN < settings["min_length"])
        if settings["max_length"] is not None:
            only_eos_RN = only_eos_RN | (length_RN >= settings["max_length"])
        for place, token in (settings["forced_tokens"] or {}).items():
            content_RN[:, int(place)] |= eos_RN[:, int(place)] != token
            only_eos_RN[:, int(place)] |= eos_RN[:, int(place)] == token
        there_RN = (sample_RN >= 0) & (eos_RN >= 0)
        return content_RN & there_RN, only_eos_RN & there_RN

    def _nothing_left(self, where: str) -> str:
        said = ", ".join(f"{rule} {self.config[rule]}" for rule in RULES if self.config[rule] is not None)
        return f"nothing is left to draw {where}: change {said}"

    def _plan(self, block_N: Tensor, steps: int) -> list[int]:
        """How many positions of a row are decided at each step: the schedule's numbers, block after block."""
        sizes = [size for size in block_N.bincount().tolist() if size]
        if steps < len(sizes):
            raise ValueError(
                f"num_inference_steps {steps} is less than the {len(sizes)} blocks of "
                f"block_length {self.config['block_length']!r}"
            )
        schedule = SCHEDULES[self.config["unmasking"]]
        more = {"exponent": self.config["exponent"]} if self.config["unmasking"] == "power" else {}
        # A step for each block, the others in proportion to what is left of the blocks.
        room = [total - block - 1 for block, total in enumerate(accumulate(sizes))]
        until = [0, *((steps - len(sizes)) * left // max(1, room[-1]) + block + 1 for block, left in enumerate(room))]
        return [
            number
            for size, (first, last) in zip(sizes, pairwise(until), strict=True)
            for number in schedule(size, last - first, **more)
        ]

    def needs(self, state: State) -> Tensor:
        """where_RN: the positions whose logits the next step reads."""
        where_RN = _candidates(state)
        if self.config["remask"] == "edit":
            decided_RN = ~state.undecided_RN & (state.block_RN >= 0)
            where_RN = where_RN | (decided_RN & where_RN.any(1, keepdim=True))
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
        """Decide some of the undecided positions, and mask or replace decided ones if remasking says so.

        Args:
            model_output: logits_MV at the positions of `where`; -inf at ids that cannot be. They may be on another
                device than all else: what the step needs to know of them is then read once.
            timestep: `state.steps` - 1 at the first step, 0 at the last.
            sample_RN: local ids; V where undecided, -1 at padding.
            where: what `needs` returned.
            state: what the step before returned.
            generator: one per row. A row takes the same numbers from its own whatever rows stand beside it.
        """
        settings, index = self.config, state.steps - 1 - int(timestep)
        candidate_RN, frames = _candidates(state), state.frames
        per_token = settings["draw"] == "gumbel"
        numbers = 1 + model_output.shape[-1] if per_token else 2 if frames is None else 3
        uniform_MX = _uniform(where.sum(1).tolist(), numbers, generator)
        order_M, draw = (uniform_MX[:, 0], uniform_MX[:, 1:]) if per_token else (uniform_MX[:, 1], uniform_MX[:, 0])
        order_M, draw = order_M.to(sample_RN.device), draw.to(model_output.device, non_blocking=True)
        truncation = {key: settings[key] for key in ("temperature", "top_k", "top_p", "typical_p")}
        later_M = torch.zeros_like(order_M, dtype=torch.bool)
        if frames is not None:
            content_RN, only_eos_RN = frames.decided(sample_RN, state.mask_token_id)
            model_output = frames.restrict(model_output, content_RN[where], only_eos_RN[where], state.eos_RN[where])
            later_M = (frames.later(where) & ~content_RN & ~only_eos_RN)[where]
        logits_MV, left_M = self._restricted(model_output, sample_RN, where, state)
        candidates = sample_tokens(logits_MV, draw, **truncation)
        if bool(later_M.any()):
            row_U = torch.nonzero(later_M).flatten()
            again = uniform_MX[:, 1:] if per_token else uniform_MX[:, 2]
            parts = (row_U, state.eos_RN[where][row_U], again[row_U.to(again.device)])
            row_U, eos_U, uniform_U = (part.to(logits_MV.device, non_blocking=True) for part in parts)
            candidates.follow(row_U, eos_U, logits_MV, uniform_U, **truncation)
        candidates = candidates.to(sample_RN.device, *self._read(state))
        if left_M is not None and not bool(left_M.all()):
            raise ValueError(self._nothing_left("at a position"))
        check_finite(candidates.log_p_M)

        if settings["unmasking"] == "ancestral":
            decide_RN, remask_RN = self._posterior(index, candidate_RN, where, order_M, state, generator)
        else:
            score_RN = self._score(index, candidates, order_M, where, state).masked_fill(~candidate_RN, -torch.inf)
            decide_RN = _highest(score_RN, self._number(index, candidates, score_RN, where, state)) & candidate_RN
            remask_RN = torch.zeros_like(decide_RN)

        token_RN, probs_RN = sample_RN.clone(), state.probs_RN.clone()
        token_RN[where], probs_RN[where] = candidates.token_M, candidates.log_p_M.exp()
        if settings["remask"] == "edit":
            token_RN[where] = torch.where(state.undecided_RN[where], candidates.token_M, candidates.best_M)
            probs_RN[where] = torch.where(state.undecided_RN[where], candidates.log_p_M.exp(), candidates.best_p_M)
            surer_RN = torch.zeros_like(where).masked_scatter(
                where, candidates.best_p_M >= settings["editing_threshold"]
            )
            decide_RN = decide_RN | (surer_RN & ~state.undecided_RN & (token_RN != sample_RN))
        if frames is not None:
            content_RN, only_eos_RN = frames.follow(decide_RN & state.undecided_RN, token_RN)
            token_RN, probs_RN = token_RN.where(~only_eos_RN, state.eos_RN), probs_RN.masked_fill(only_eos_RN, 1.0)
            content_M = content_RN[where]
            token_RN[content_RN], probs_RN[content_RN] = (
                candidates.content_M[content_M],
                candidates.content_log_p_M[content_M].exp(),
            )
        sample_RN = torch.where(decide_RN, token_RN, sample_RN).masked_fill(remask_RN, state.mask_token_id)
        probs_RN = torch.where(decide_RN, probs_RN, state.probs_RN).masked_fill(remask_RN, torch.nan)
        undecided_RN = state.undecided_RN & ~decide_RN | remask_RN
        return SamplerOutput(sample_RN, replace(state, undecided_RN=undecided_RN, probs_RN=probs_RN))

    def _read(self, state: State) -> list[str]:
        """What the order, the unmasking, remasking and frames look at beside the token and its probability."""
        order, unmasking, remask = (self.config[name] for name in ("order", "unmasking", "remask"))
        return [
            *(["margin_M"] if order == "margin" else []),
            *(["entropy_M"] if order == "entropy" or unmasking == "entropy_bound" else []),
            *(["best_M", "best_p_M"] if remask == "edit" else []),
            *([] if state.frames is None else ["content_M", "content_log_p_M"]),
        ]

    def _restricted(
        self, logits_MV: Tensor, sample_RN: Tensor, where: Tensor, state: State
    ) -> tuple[Tensor, Tensor | None]:
        """Logits with -inf at ids that the settings rule out, and where that leaves something; None if no rule is set.

        Tables are read where they are, and only what the logits need is sent to these.
        """
        settings, device = self.config, logits_MV.device
        row_M, column_M = where.nonzero().unbind(1)

        def sent(table: Tensor) -> Tensor:
            return table.to(device, non_blocking=True)

        if settings["repetition_penalty"] != 1:
            # By level and id; stops in the room behind the content are no repetition.
            size, levels = state.mask_token_id + 1, int(state.levels_RN.max()) + 1
            held_RX = torch.zeros(len(sample_RN), levels * size, dtype=torch.bool, device=sample_RN.device)
            counts_RN = (sample_RN >= 0) & (sample_RN != state.eos_RN)
            held_RX.scatter_(1, state.levels_RN * size + sample_RN.where(counts_RN, state.mask_token_id), True)
            held_MV = sent(held_RX.view(-1, levels, size))[sent(row_M), sent(state.levels_RN[where]), :-1]
            log_p_MV = torch.log_softmax(logits_MV, -1)
            logits_MV = torch.where(held_MV, log_p_MV * settings["repetition_penalty"], log_p_MV)
        if all(settings[rule] is None for rule in RULES):
            return logits_MV, None
        id_V = torch.arange(logits_MV.shape[1], device=device)
        if settings["suppress_tokens"]:
            logits_MV = logits_MV.index_fill(1, sent(torch.tensor(settings["suppress_tokens"])), -torch.inf)
        length_M, eos_M = state.coords_RN3[where][:, 0], state.eos_RN[where]
        if settings["min_length"] is not None:
            early_M = torch.where(length_M < settings["min_length"], eos_M, -1)
            logits_MV = logits_MV.masked_fill(id_V == sent(early_M)[:, None], -torch.inf)
        if settings["max_length"] is not None:
            must_M = (length_M >= settings["max_length"]) & (eos_M >= 0)
            logits_MV = logits_MV.masked_fill(sent(must_M)[:, None] & (id_V != sent(eos_M)[:, None]), -torch.inf)
        for place, token in (settings["forced_tokens"] or {}).items():
            here_M = column_M == int(place)
            logits_MV = logits_MV.masked_fill(sent(here_M)[:, None] & (id_V != token), -torch.inf)
        left_M = ~logits_MV.isneginf().all(-1)
        return logits_MV.masked_fill(~left_M[:, None], 0), left_M

    def _score(self, index: int, candidates: Candidates, uniform_M: Tensor, where: Tensor, state: State) -> Tensor:
        settings = self.config
        if settings["order"] in BY_PLACE:
            score_M = state.place_RN[where]
        else:
            score_M = BY_MODEL[settings["order"]](candidates, uniform_M)
        if settings["order_temperature"]:
            left_R = (1 - (index + 1) / state.steps_R.double()).clamp_min(0)
            noise_M = settings["order_temperature"] * left_R[:, None].expand(where.shape)[where]
            score_M = score_M + noise_M * gumbel(uniform_M)
        if settings["level_penalty"]:
            score_M = score_M - settings["level_penalty"] * state.levels_RN[where]
        return torch.full(where.shape, -torch.inf, dtype=torch.float64, device=where.device).masked_scatter(
            where, score_M
        )

    def _number(self, index: int, candidates: Candidates, score_RN: Tensor, where: Tensor, state: State) -> Tensor:
        """How many of each row's candidates are decided, from the highest score."""
        unmasking = self.config["unmasking"]
        if unmasking in SCHEDULES:
            return state.decide_RK[:, index]
        none = torch.inf if unmasking == "entropy_bound" else -1.0
        value_M = candidates.entropy_M if unmasking == "entropy_bound" else candidates.log_p_M.exp()
        value_RN = torch.full_like(score_RN, none).masked_scatter(where, value_M)
        value_RN = value_RN.masked_fill(score_RN.isneginf(), none)
        sorted_RN = value_RN.gather(1, score_RN.argsort(dim=1, descending=True, stable=True))
        return ADAPTIVE[unmasking](sorted_RN, self.config[unmasking])

    def _posterior(
        self,
        index: int,
        candidate_RN: Tensor,
        where: Tensor,
        uniform_M: Tensor,
        state: State,
        generator: Sequence[torch.Generator],
    ) -> tuple[Tensor, Tensor]:
        """Which positions are decided, and which are masked again: each by itself."""
        settings = self.config
        remask, eta = settings["remask"], settings["eta"]
        t_on, t_off, plateau = settings["loop"] or _LOOP
        step_R = torch.full_like(state.steps_R, index)
        alpha_R2 = alphas(step_R, state.steps_R, remask, t_on, t_off, plateau)
        sigma_RN = torch.zeros_like(state.probs_RN)
        if remask in POSTERIOR:
            sigma_RN = sigma(alpha_R2, step_R, state.steps_R, state.probs_RN, remask, eta, t_on, t_off)
        kept_RN = 1 if remask == "conf" else 1 - sigma_RN  # "conf" has σ = 0 where masked
        decide_RN = (alpha_R2[:, 1:] - kept_RN * alpha_R2[:, :1]) / (1 - alpha_R2[:, :1])
        uniform_RN = torch.ones_like(state.probs_RN).masked_scatter(where, uniform_M)
        remask_RN = torch.zeros_like(where)
        if remask in POSTERIOR:
            decided_RN = ~state.undecided_RN & (state.block_RN >= 0)
            again_D = _uniform(decided_RN.sum(1).tolist(), 1, generator)[:, 0].to(where.device)
            remask_RN = decided_RN & (torch.ones_like(state.probs_RN).masked_scatter(decided_RN, again_D) < sigma_RN)
        return candidate_RN & (uniform_RN < decide_RN), remask_RN


def _blocks(size: int | str | None, undecided_RN: Tensor, levels_RN: Tensor) -> Tensor:
    """block_RN, -1 at padding."""
    if size is None:
        block_RN = torch.zeros_like(levels_RN)
    elif size == "level":
        block_RN = levels_RN
    else:
        block_RN = torch.arange(levels_RN.shape[1], device=levels_RN.device).expand_as(levels_RN) // int(size)
    return block_RN.masked_fill(~undecided_RN, -1)


def current_block(state: State) -> Tensor:
    """block_R: number of each row's first block with undecided positions; a huge one where there is none."""
    far = torch.iinfo(state.block_RN.dtype).max
    return state.block_RN.masked_fill(~state.undecided_RN, far).amin(1)


def _candidates(state: State) -> Tensor:
    """Undecided positions of the current block."""
    return state.undecided_RN & (state.block_RN == current_block(state)[:, None])


def _uniform(counts_R: Sequence[int], numbers: int, generator: Sequence[torch.Generator]) -> Tensor:
    """float64 [M, numbers]: each row's numbers from that row's generator, on the device of the first."""
    rows = [
        torch.rand(count, numbers, generator=g, dtype=torch.float64, device=g.device)
        for count, g in zip(counts_R, generator, strict=True)
    ]
    return torch.cat([row.to(rows[0].device) for row in rows])


def _highest(score_RN: Tensor, count_R: Tensor) -> Tensor:
    """bool: the count_R highest scores of each row; among equals the first."""
    order_RN = score_RN.argsort(dim=1, descending=True, stable=True)
    rank_RN = torch.empty_like(order_RN)
    columns_RN = torch.arange(order_RN.shape[1], device=order_RN.device).expand_as(order_RN)
    return rank_RN.scatter(1, order_RN, columns_RN) < count_R[:, None]
