"""`MaskSampler`: unmasks the codes of one tokenizer, composed of parts.

`multidiff.samplers.protocol` says what a sampler is. This one has an order, blocks, unmasking, token sampling,
remasking, guidance and logit rules; each is a small class in a file of its own. Codes of a unit of varying length are
all EOS or all content (`multidiff.samplers.frames`).

Shape suffixes: R rows, N columns, M = positions of `where_RN`, row by row, U some of them; V local ids; X random
numbers of a position; 3 axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from multidiff.samplers.checks import check_known, check_table
from multidiff.samplers.logit_rules import is_place
from multidiff.samplers.mask_state import MaskState, highest
from multidiff.samplers.parts import Parts
from multidiff.samplers.protocol import SamplerOutput
from multidiff.samplers.state import State, draw_uniform
from multidiff.samplers.token_sampling import Candidates, check_finite
from multidiff.samplers.unmasking import STEPS


class MaskSampler(SchedulerMixin, ConfigMixin):
    """Decides masked positions step by step.

    With `order="random"`, `unmasking="linear"` and a step for every position it is the exact ancestral process: each
    draw comes from the model's own conditional. `order="confidence"`, `unmasking="cosine"` is MaskGIT.

    The settings are flat, as they stand in YAML, in `samplers.json` and in `--sampler.NAME.KEY`. `config` holds them,
    and `parts` the objects that they make. The classes in `multidiff.samplers.parts` say more about each.

    Args:
        order: which positions are next. By what the model thinks: "confidence", "margin", "entropy". By where they
            stand: "left_to_right" (text, sound), "row_scan", "halton" (pictures). By chance: "random".
        order_temperature: noise on the order, which falls to none at the last step; 0 is none.
        level_penalty: subtracted from the order's score for each residual level, so that coarse codes come first.
        block_length: decode in blocks of `block_length` codes. Each block is finished before the next one starts.
            "level" makes a block of each residual level, None one block of all codes, or those of the model's
            attention.
        cache: "auto", "none", "exact" (of models whose attention has an order), "approximate_prefix" or
            "approximate_dual" (Fast-dLLM). Samplers that run together need the same.
        unmasking: how many positions a step decides. Schedules: "linear", "cosine", "arccos", "power". Adaptive:
            "threshold", "factor" (order "confidence") and "entropy_bound" (order "entropy"). "ancestral": each position
            by itself with the probability of the reverse process (order "random").
        exponent: p of unmasking "power".
        threshold: least probability of unmasking "threshold", in [0, 1].
        factor: f of unmasking "factor".
        entropy_bound: γ of unmasking "entropy_bound", in nats.
        remask: "none": what is decided stays. "cap", "rescale", "conf", "loop": ReMDM's (unmasking "ancestral").
            "edit": a decided token is replaced where the model is confident of another one.
        eta: η of "cap", "rescale" and "loop", in [0, 1].
        loop: [t_on, t_off, α] of "loop".
        editing_threshold: probability from which "edit" replaces, in [0, 1].
        temperature: of the token draw; 0 is greedy.
        top_k, top_p, typical_p: truncations of the token draw, in this order.
        draw: "inverse" inverts the cumulative distribution; "gumbel" adds Gumbel noise, as LLaDA does.
        suppress_tokens: local ids that are never drawn.
        forced_tokens: local id by place among the codes to fill in, from 0, through all segments of the tokenizer.
        min_length, max_length: of content whose length varies, in its unit (tokens, frames).
        repetition_penalty: multiplies the log-probability of ids that the run has decided in the document; 1 is none.
        num_inference_steps: K where a run does not say; None is 16, or 16 for each block of the model's attention. An
            adaptive unmasking finds its own.
        guidance_scale: of classifier-free guidance where a run does not say; 1 is none. One number for all given
            segments, or {tokenizer: scale}, each with that tokenizer's given segments masked.
        guidance_schedule: "constant", "linear", or [first, last], the share of steps done from and to which it guides.
        canvas: size of a blank where a request does not say; None is the tokenizer's default.

    Raises:
        ValueError: a setting that is out of range, or two that contradict each other; the message names them.

    Examples:
        >>> import torch
        >>> sampler = MaskSampler(order="left_to_right", unmasking="linear", temperature=0.0)
        >>> generators = [torch.Generator().manual_seed(0)]
        >>> sample_RN, levels_RN = torch.full((1, 3), 2), torch.zeros(1, 3, dtype=torch.int64)  # 3 unknown codes
        >>> coords_RN3 = torch.arange(3)[None, :, None].expand(1, 3, 3)
        >>> state = sampler.start(sample_RN, levels_RN, coords_RN3, num_inference_steps=3, generator=generators)
        >>> for timestep in range(state.steps - 1, -1, -1):
        ...     where_RN = sampler.needs(state)
        ...     logits_MV = torch.tensor([[0.0, 1.0]])  # of a model; here one position is asked for at each step
        ...     output = sampler.step(logits_MV, timestep, sample_RN, where=where_RN, state=state, generator=generators)
        ...     sample_RN, state = output.prev_sample, output.state
        ...     print(sample_RN.tolist())
        [[1, 2, 2]]
        [[1, 1, 2]]
        [[1, 1, 1]]
    """

    config_name = "sampler_config.json"

    @register_to_config
    def __init__(
        self,
        order: str = "confidence",
        order_temperature: float = 0.0,
        level_penalty: float = 0.0,
        block_length: int | Literal["level"] | None = None,
        cache: str = "auto",
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
        self.parts = Parts.of(self.config)
        if canvas is not None:
            check_table("canvas", canvas)
        self.set_timesteps(num_inference_steps or STEPS)

    @classmethod
    def from_settings(cls, settings: dict[str, Any], where: str) -> Self:
        """A sampler from plain settings, as in `samplers.json`.

        Args:
            where: the file and key that they come from, for errors.

        Raises:
            ValueError: an unknown key (the message names the nearest) or a bad value; it names `where`.
        """
        check_known(settings, cls._get_init_keys(cls) - {"self"}, where)
        try:
            forced = settings.get("forced_tokens")
            if isinstance(forced, Mapping) and all(map(is_place, forced)):  # JSON's keys are text
                settings = {**settings, "forced_tokens": {int(place): token for place, token in forced.items()}}
            return cls(**settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None

    @property
    def settings(self) -> dict[str, Any]:
        """Plain settings; `from_settings` takes them back."""
        return {key: value for key, value in self.config.items() if not key.startswith("_")}

    @property
    def is_adaptive(self) -> bool:
        return self.parts.unmasking.is_adaptive

    @property
    def cache_mode(self) -> str:
        return self.parts.blocks.cache

    @property
    def num_inference_steps(self) -> int | None:
        return self.parts.unmasking.num_inference_steps

    @property
    def guidance_scale(self) -> float | Mapping[str, float]:
        return self.parts.guidance.guidance_scale

    @property
    def canvas(self) -> Mapping[str, int] | None:
        return self.config["canvas"]

    def guidance_at(self, scale: float, step: int, state: State) -> Tensor:
        return self.parts.guidance.scale_at(scale, step, state.steps_R)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """diffusers' convention: `timesteps` counts down to 0."""
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)

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
        block_RN: Tensor | None = None,
        draft_RN: Tensor | None = None,
        noise_R: Tensor | None = None,
        generator: Sequence[torch.Generator],
    ) -> MaskState:
        """The state before the first step; see `Sampler.start`. A random order is drawn here."""
        return MaskState.first(
            self.parts,
            sample_RN,
            levels_RN,
            coords_RN3,
            num_inference_steps,
            eos_RN,
            extent_RN3,
            frame_RN,
            block_RN,
            draft_RN,
            noise_R,
            generator,
        )

    def needs(self, state: MaskState) -> Tensor:
        """where_RN: the positions that the next step decides, if that is known without their logits, else all undecided
        positions of the current block. Editing also reads the decided ones."""
        where_RN = state.candidates_RN if state.next_RN is None else state.next_RN
        if self.parts.remasking.edits:
            asking_R = where_RN.any(1)
            if not self.is_adaptive:  # for an adaptive rule the run ends when all is decided
                asking_R = asking_R | state.draft_R
            where_RN = where_RN | (state.decided_RN & asking_R[:, None])
        return where_RN

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample_RN: Tensor,
        *,
        where: Tensor,
        state: MaskState,
        generator: Sequence[torch.Generator],
    ) -> SamplerOutput:
        """Decide some of the undecided positions, and mask or replace decided ones if the remasking says so.

        See `Sampler.step`. Each position of `where` takes two random numbers, three if the run has frames; with draw
        "gumbel" one, and one for each token.
        """
        parts, index = self.parts, state.steps - 1 - int(timestep)
        per_token = parts.token_sampling.is_per_token
        numbers = 1 + model_output.shape[-1] if per_token else 2 if state.frames is None else 3
        uniform_MX = draw_uniform(where.sum(1).tolist(), numbers, generator)
        order_M = uniform_MX[:, 0 if per_token else 1].to(sample_RN.device)
        candidates = self._sample(model_output, uniform_MX, sample_RN, where, state)
        decide_RN = state.next_RN
        if decide_RN is None:
            steps_M = state.steps_R[:, None].expand(where.shape)[where]
            score_M = parts.order.scores(candidates, state.score_RN[where], order_M, index, steps_M)
            score_RN = torch.full_like(state.score_RN, -torch.inf).masked_scatter(where, score_M)
            score_RN = score_RN.masked_fill(~state.candidates_RN, -torch.inf)
            if parts.unmasking.is_scheduled:
                count_R = state.plan_RK[:, index]
            else:
                count_R = parts.unmasking.adaptive_count(candidates, score_RN, where)
            decide_RN = highest(score_RN, count_R)
        decide_RN, token_RN, probs_RN = self._tokens(candidates, decide_RN, sample_RN, where, state)
        sample_RN = torch.where(decide_RN, token_RN, sample_RN).masked_fill(state.remask_RN, state.mask_token_id)
        probs_RN = torch.where(decide_RN, probs_RN, state.probs_RN).masked_fill(state.remask_RN, torch.nan)
        undecided_RN = state.undecided_RN & ~decide_RN | state.remask_RN
        if state.ends:
            rest_RN = state.behind_eos(sample_RN, undecided_RN)
            sample_RN, probs_RN = sample_RN.where(~rest_RN, state.eos_RN), probs_RN.masked_fill(rest_RN, 1.0)
            undecided_RN = undecided_RN & ~rest_RN
        state = replace(state, undecided_RN=undecided_RN, probs_RN=probs_RN)
        return SamplerOutput(sample_RN, state.look_ahead(parts, index + 1, generator))

    def _sample(
        self, logits_MV: Tensor, uniform_MX: Tensor, sample_RN: Tensor, where: Tensor, state: MaskState
    ) -> Candidates:
        """A candidate for each position of `where`, on the device of the tables."""
        parts, frames, device = self.parts, state.frames, sample_RN.device
        per_token = parts.token_sampling.is_per_token
        draw = (uniform_MX[:, 1:] if per_token else uniform_MX[:, 0]).to(logits_MV.device, non_blocking=True)
        later_M = torch.zeros(len(logits_MV), dtype=torch.bool, device=device)
        if frames is not None:
            content_RN, only_eos_RN = frames.decided(sample_RN, state.mask_token_id)
            logits_MV = frames.restrict(logits_MV, content_RN[where], only_eos_RN[where], state.eos_RN[where])
            later_M = (frames.later(where) & ~content_RN & ~only_eos_RN)[where]
        logits_MV, left_M = parts.rules.apply(logits_MV, sample_RN, where, state, state.eos_RN, state.coords_RN3)
        candidates = parts.token_sampling.sample(logits_MV, draw, parts.reads)
        if bool(later_M.any()):
            row_U = torch.nonzero(later_M).flatten()
            again = uniform_MX[:, 1:] if per_token else uniform_MX[:, 2]
            tables = (row_U, state.eos_RN[where][row_U], again[row_U.to(again.device)])
            row_U, eos_U, uniform_U = (table.to(logits_MV.device, non_blocking=True) for table in tables)
            parts.token_sampling.sample_content(candidates, row_U, eos_U, logits_MV, uniform_U)
        of_frames = () if frames is None else ("content_M", "content_log_probs_M")
        candidates = candidates.to(device, *parts.reads, *of_frames)
        if left_M is not None and not bool(left_M.all()):
            raise parts.rules.nothing_left("at a position")
        check_finite(candidates.log_probs_M)
        return candidates

    def _tokens(
        self, candidates: Candidates, decide_RN: Tensor, sample_RN: Tensor, where: Tensor, state: MaskState
    ) -> tuple[Tensor, Tensor, Tensor]:
        """decide_RN with the positions that are edited, token_RN and probs_RN, which hold at the positions of these."""
        remasking, frames = self.parts.remasking, state.frames
        token_RN, probs_RN = sample_RN.clone(), state.probs_RN.clone()
        token_RN[where], probs_RN[where] = candidates.token_M, candidates.log_probs_M.exp()
        if remasking.editing_threshold is not None:
            edit_RN = where & ~state.undecided_RN
            edit_M = edit_RN[where]
            token_RN[edit_RN], probs_RN[edit_RN] = candidates.best_M[edit_M], candidates.best_probs_M[edit_M]
            sure_RN = probs_RN >= remasking.editing_threshold
            decide_RN = decide_RN | (edit_RN & sure_RN & (token_RN != sample_RN))
        if frames is not None:
            content_RN, only_eos_RN = frames.follow(decide_RN & state.undecided_RN, token_RN)
            token_RN, probs_RN = token_RN.where(~only_eos_RN, state.eos_RN), probs_RN.masked_fill(only_eos_RN, 1.0)
            content_M = content_RN[where]
            token_RN[content_RN] = candidates.content_M[content_M]
            probs_RN[content_RN] = candidates.content_log_probs_M[content_M].exp()
        return decide_RN, token_RN, probs_RN
