"""`AncestralSampler`: follows the reverse of a forward process step by step.

Shape suffixes: R rows, N columns, M = positions of `where_RN`, row by row; V local ids, X = V + 1 of these and
`<mask>`; 3 axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Self

import torch
from torch import Tensor

from multidiff.processes import Process
from multidiff.samplers.checks import check_known, check_table
from multidiff.samplers.frames import Frames, draw_frames
from multidiff.samplers.guidance import Guidance
from multidiff.samplers.protocol import SamplerOutput
from multidiff.samplers.state import State, check_noise, draw_uniform, noise_at_start
from multidiff.samplers.token_sampling import TokenSampling, check_finite
from multidiff.samplers.unmasking import check_steps

_STEPS = 64  # where nobody says


@dataclass(frozen=True, kw_only=True)
class AncestralState(State):
    """`State`, with what an `AncestralSampler` remembers.

    Attributes:
        time_R: float64, the time that the run starts from; 1 unless it goes on from a draft.
        left_R: float64, how much noise there is left.
        sizes_RN: int64, how many ids each position has.
        eos_RN: int64, local id of EOS at each position; -1 where the content cannot end.
        frames: which positions are EOS or content together; None where each stands alone.
    """

    time_R: Tensor
    left_R: Tensor
    sizes_RN: Tensor
    eos_RN: Tensor
    frames: Frames | None

    @property
    def noise_R(self) -> Tensor:
        return self.left_R


class AncestralSampler:
    """Draws x_s from p(x_s | x_t) at every one of K steps from t = 1 to 0, at all positions at once.

    Where noise is uniform or mixed, every step may change every token, those that it has set before included. No
    position counts as decided before the last step, in which codes of a frame become all EOS or all content. The
    probability of a token is that which the model gave it when it was last set. A draft is taken for x_t, where t is
    the time at which there is as much noise as it has undecided codes, or as its request says.

    Args:
        process: the forward process that the model was trained with.
        num_inference_steps: K where a run does not say; None is 64. Positions of one step are drawn as if independent,
            so more steps follow the model more closely.
        temperature: divides the logits of x_0; 0 takes the most probable one, so that only noise is left to chance.
        guidance_scale, guidance_schedule: the same as in `MaskSampler`.
        canvas: size of a blank where a request does not say; None is the tokenizer's default.

    Raises:
        ValueError: a setting that is out of range.

    Examples:
        >>> import torch
        >>> from multidiff.processes import Uniform
        >>> sampler = AncestralSampler(Uniform(), num_inference_steps=8)
        >>> sample_RN, levels_RN = torch.full((1, 3), 5), torch.zeros(1, 3, dtype=torch.int64)  # 3 codes of 5 ids
        >>> state = sampler.start(
        ...     sample_RN, levels_RN, levels_RN[..., None].expand(1, 3, 3), generator=[torch.Generator().manual_seed(0)]
        ... )
        >>> state.steps, bool((state.start_RN < 5).all())
        (8, True)
    """

    is_adaptive = False
    cache_mode = "none"

    def __init__(
        self,
        process: Process,
        num_inference_steps: int | None = None,
        temperature: float = 1.0,
        guidance_scale: float | Mapping[str, float] = 1.0,
        guidance_schedule: str | Sequence[float] = "constant",
        canvas: Mapping[str, int] | None = None,
    ):
        if num_inference_steps is not None:
            check_steps(num_inference_steps)
        TokenSampling(temperature)  # checks it
        if canvas is not None:
            check_table("canvas", canvas)
        self.process, self.num_inference_steps, self.temperature = process, num_inference_steps, temperature
        self.canvas = canvas
        self._guidance = Guidance(guidance_scale, guidance_schedule)

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
        return f"AncestralSampler({self.process!r}, {settings})"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], process: Process, where: str) -> Self:
        """A sampler from plain settings, as in `samplers.json`; see `MaskSampler.from_settings`."""
        check_known(settings, set(signature(cls).parameters) - {"process"}, where)
        try:
            return cls(process, **settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None

    @property
    def settings(self) -> dict[str, Any]:
        """Plain settings; `from_settings` takes them back."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "temperature": self.temperature,
            "guidance_scale": self._guidance.guidance_scale,
            "guidance_schedule": self._guidance.guidance_schedule,
            "canvas": self.canvas,
        }

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
        draft_RN: Tensor | None = None,
        noise_R: Tensor | None = None,
        generator: Sequence[torch.Generator],
    ) -> AncestralState:
        """The state before the first step, whose `start_RN` is drawn from the prior; see `Sampler.start`."""
        there_RN = sample_RN >= 0
        sizes_RN = sample_RN.clamp_min(0) if sizes_RN is None else sizes_RN
        uniform_M = draw_uniform(there_RN.sum(1).tolist(), 1, generator)[:, 0].to(sample_RN.device)
        ids_M, size = self.process.prior(sizes_RN[there_RN], uniform_M), int(sample_RN.max())
        start_RN = sample_RN.clone()
        start_RN[there_RN] = torch.where(ids_M == sizes_RN[there_RN], size, ids_M)
        if draft_RN is not None:
            start_RN = start_RN.where(draft_RN < 0, draft_RN)
        noise_R = noise_at_start(sample_RN, draft_RN, noise_R)
        check_noise(noise_R)
        time_R = self.process.time(noise_R).clamp(0, 1)
        steps_R = torch.full((len(sample_RN),), num_inference_steps or self.num_inference_steps or _STEPS)
        eos_RN = torch.full_like(sample_RN, -1) if eos_RN is None else eos_RN
        nothing_RN = torch.zeros_like(there_RN)
        return AncestralState.blank(
            sample_RN,
            levels_RN,
            steps_R,
            start_RN=start_RN,
            time_R=time_R,
            left_R=self.process.noise(time_R),
            sizes_RN=sizes_RN,
            eos_RN=eos_RN,
            frames=None if frame_RN is None else Frames.of(frame_RN, levels_RN, eos_RN, nothing_RN, nothing_RN),
        )

    def needs(self, state: AncestralState) -> Tensor:
        """where_RN: all positions, until the last step is done."""
        return state.undecided_RN

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample_RN: Tensor,
        *,
        where: Tensor,
        state: AncestralState,
        generator: Sequence[torch.Generator],
    ) -> SamplerOutput:
        """One step of the reverse process, which takes a random number for each position."""
        t_R, s_R = state.time_R * (timestep + 1) / state.steps, state.time_R * timestep / state.steps
        device, logits_MV = model_output.device, model_output.double()
        log_probs_MV = torch.log_softmax(logits_MV, -1)
        if self.temperature == 0:
            best_M1 = log_probs_MV.argmax(-1, keepdim=True)
            sharp_MV = torch.full_like(log_probs_MV, -torch.inf).scatter(1, best_M1, 0.0)
        else:
            sharp_MV = log_probs_MV if self.temperature == 1 else torch.log_softmax(logits_MV / self.temperature, -1)
        row_M = torch.nonzero(where)[:, 0]
        ids_M, sizes_M, t_M, s_M, uniform_M = (
            table.to(device, non_blocking=True)
            for table in (
                sample_RN[where],
                state.sizes_RN[where],
                t_R[row_M],
                s_R[row_M],
                draw_uniform(where.sum(1).tolist(), 1, generator)[:, 0],
            )
        )
        log_MX = self.process.posterior(sharp_MV, ids_M, sizes_M, t_M, s_M)
        token_M = TokenSampling().sample(log_MX, uniform_M).token_M
        said_M = log_probs_MV.gather(1, token_M.clamp_max(log_probs_MV.shape[1] - 1)[:, None])[:, 0]
        # One transfer; float64 holds ids exactly.
        token_M, said_M, finite_M = torch.stack([token_M.double(), said_M, log_probs_MV[:, 0]]).to(sample_RN.device)
        check_finite(finite_M)
        made_RN, probs_RN, undecided_RN = sample_RN.clone(), state.probs_RN.clone(), state.undecided_RN
        made_RN[where] = token_M.long()
        new_RN = (made_RN != sample_RN) | ((timestep == 0) & probs_RN.isnan() & where)
        said_RN = torch.full_like(probs_RN, torch.nan).masked_scatter(where, said_M.exp())
        probs_RN = torch.where(new_RN, said_RN.masked_fill(made_RN == state.mask_token_id, torch.nan), probs_RN)
        if timestep == 0:
            undecided_RN = undecided_RN & ~where
            if state.frames is not None:
                # What its frame makes content is noise if it says EOS: the model alone says what else it is.
                tables = (made_RN, probs_RN, where, model_output.to(sample_RN.device), where)
                made_RN, probs_RN = draw_frames(state.frames, *tables, TokenSampling(self.temperature), generator)
        left_R = self.process.noise(s_R)
        return SamplerOutput(made_RN, replace(state, undecided_RN=undecided_RN, probs_RN=probs_RN, left_R=left_R))
