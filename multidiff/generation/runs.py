"""Sampler runs: one tokenizer's unknown positions in compact tables, for its sampler.

Where the model's attention has an order, a segment waits until those before it in its document are filled in. Runs then
have stages: the first unknown segment of each document, the second, and so on, each with runs of its own.

All tables are on the CPU.

Shape suffixes: P tokens of the batch, S segments, R documents that have unknown codes of a tokenizer, N such codes of a
document, U all of them.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from multidiff.samplers import Sampler, SamplerState
from multidiff.samplers.blocks import cache_for
from multidiff.sequence import AttentionPattern, SharedVocabulary, TokenBatch


class Decision(NamedTuple):
    """One entry of a document's trace.

    Attributes:
        step: at which step, from 0.
        segment: of the document, from 0.
        place: of the code in the segment, from 0.
        token: local id; -1 where a decided code was masked again.
        p: its probability under the model (guided, before temperature and truncation); NaN where masked again.
    """

    step: int
    segment: int
    place: int
    token: int
    p: float


class SegmentFacts(NamedTuple):
    """What runs must know of the segments of a batch besides their tokens.

    Attributes:
        inside_S: int64, how many codes of each segment an EOS cannot end.
        unit_S: int64, how many codes each segment has in a unit (a token 1, a frame one of each level); they end
            together.
        draft_P: bool, the unknown codes of the batch that stand as decided at the start; None where none do.
        noise_S: float64, how much noise a sampler must at least presume in each segment; None is 0.
    """

    inside_S: Tensor
    unit_S: Tensor
    draft_P: Tensor | None = None
    noise_S: Tensor | None = None


@dataclass
class SamplerRun:
    """One tokenizer's unknown positions: a row for each document that has any.

    Attributes:
        name, sampler: of the tokenizer.
        scales: guidance scale by tokenizer whose given segments guide; "" for all of them together.
        documents: of each row.
        place_RN: place in P; 0 at padding.
        inside_RN: where an EOS cannot be drawn: before the end of codes whose end is known. Elsewhere the sampler keeps
            the codes of a frame together.
        sample_RN, state: as the sampler has them.
        stage: runs of a stage start when those of the one before it are done.
        is_ordered: whether the model's attention has an order, so that nothing follows once all is decided.
        fresh_R: whether the row has changed since its last forward pass.
        where_RN: the positions whose logits the last forward pass gave.
        block_R: the block that the row was in at its last whole forward pass; -1 before.
    """

    name: str
    sampler: Sampler
    scales: Mapping[str, float]
    documents: list[int]
    place_RN: Tensor
    inside_RN: Tensor
    sample_RN: Tensor
    state: SamplerState
    stage: int = 0
    is_ordered: bool = False
    fresh_R: Tensor = field(init=False)
    where_RN: Tensor = field(init=False)
    block_R: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.fresh_R = torch.ones(len(self.documents), dtype=torch.bool)
        self.where_RN = torch.zeros_like(self.inside_RN)
        self.block_R = torch.full_like(self.place_RN[:, 0], -1)

    def done(self, step: int) -> bool:
        """Whether step `step` of the run would have nothing to do. Runs of adaptive samplers may end before their last
        step, and those that an EOS ends."""
        may_end = self.sampler.is_adaptive or self.is_ordered
        return step >= self.state.steps or (may_end and not bool(self.state.undecided_RN.any()))


def make_runs(
    batch: TokenBatch,
    segments: SegmentFacts,
    vocabulary: SharedVocabulary,
    samplers: Mapping[str, Sampler],
    generators: Sequence[torch.Generator],
    steps: int | None = None,
    scale: float | Mapping[str, float] | None = None,
    pattern: AttentionPattern = AttentionPattern(),  # noqa: B008 (frozen)
) -> list[SamplerRun]:
    """The runs of a batch, in the order of their stages.

    Args:
        batch: the documents.
        segments: of the batch.
        vocabulary, samplers: of the tokenizers.
        generators: one per document.
        steps, scale: for all of them; None takes each sampler's own.
        pattern: of the model's attention.

    Raises:
        ValueError: more steps than codes, steps for samplers that find their own, samplers that cannot run together,
            samplers or a pattern that cannot go on from a draft.
    """
    runs = []
    place_P = places(batch)
    extent_S3 = torch.zeros(len(batch.document_S), 3, dtype=torch.int64)
    index_P3 = batch.segment_P.clamp_min(0)[:, None].expand(-1, 3)
    extent_S3 = extent_S3.scatter_reduce(0, index_P3, batch.coords_P3 + 1, "amax")
    tokenizer_P = batch.spread(batch.tokenizer_S, -1)
    document_P = batch.document_P
    number_P, stage_P = pattern.numbers(batch), batch.spread(_stages(batch, pattern), 0)
    kinds = list(enumerate(vocabulary.spans.items()))
    for stage, (tokenizer, (name, spans)) in itertools.product(range(int(stage_P.max()) + 1), kinds):
        flat_U = torch.nonzero(~batch.known_P & (tokenizer_P == tokenizer) & (stage_P == stage)).flatten()
        if not len(flat_U):
            continue
        sampler, varies = samplers[name], vocabulary.tokenizers[name].variable_length
        rows, row_U, count_R = torch.unique(document_P[flat_U], return_inverse=True, return_counts=True)
        column_U = torch.arange(len(flat_U)) - (count_R.cumsum(0) - count_R)[row_U]
        index = (row_U, column_U)
        place_RN = torch.zeros(len(rows), int(count_R.max()), dtype=torch.int64)
        place_RN[index] = flat_U
        sample_RN = torch.full_like(place_RN, -1)
        sample_RN[index] = max(stop - start for start, stop in spans)
        levels_RN = (batch.span_P[place_RN] - vocabulary.first_span[name]).where(sample_RN >= 0, 0)
        segment_U = batch.segment_P[flat_U]
        inside_RN = torch.zeros_like(sample_RN, dtype=torch.bool)
        inside_RN[index] = (place_P[flat_U] < segments.inside_S[segment_U]) & varies
        eos_RN = vocabulary.eos_ids(name, levels_RN).masked_fill(inside_RN, -1) if varies else None
        frame_RN = None
        if varies and bool((segments.unit_S[batch.tokenizer_S == tokenizer] > 1).any()):
            unit_U = place_P[flat_U] // segments.unit_S[segment_U]
            frame_RN = torch.full_like(place_RN, -1)
            frame_RN[index] = torch.unique(segment_U * len(place_P) + unit_U, return_inverse=True)[1]
        more = {} if pattern.is_full else {"block_RN": number_P[place_RN].masked_fill(sample_RN < 0, -1)}
        if segments.draft_P is not None and bool(segments.draft_P[flat_U].any()):
            _check_drafts(name, sampler, pattern)
            local_RN = vocabulary.to_local(name, batch.ids_P[place_RN].where(sample_RN >= 0, spans[0][0]), levels_RN)
            more["draft_RN"] = local_RN.where((sample_RN >= 0) & segments.draft_P[place_RN], -1)
            if segments.noise_S is not None:
                none_R = torch.zeros(len(rows), dtype=torch.float64)
                more["noise_R"] = none_R.scatter_reduce(0, row_U, segments.noise_S[segment_U], "amax")
        state = sampler.start(
            sample_RN,
            levels_RN,
            batch.coords_P3[place_RN],
            num_inference_steps=None if sampler.is_adaptive else steps,
            eos_RN=eos_RN,
            extent_RN3=extent_S3[batch.segment_P[place_RN].clamp_min(0)],
            frame_RN=frame_RN,
            sizes_RN=torch.tensor([stop - start for start, stop in spans])[levels_RN],
            **more,
            generator=[generators[document] for document in rows.tolist()],
        )
        strength = sampler.guidance_scale if scale is None else scale
        scales = strength if isinstance(strength, Mapping) else {"": strength}
        tables = (place_RN, inside_RN, state.start_RN, state)
        runs.append(SamplerRun(name, sampler, scales, rows.tolist(), *tables, stage, not pattern.is_full))
    _check_together(runs, steps, pattern)
    return runs


def places(batch: TokenBatch) -> Tensor:
    """place_P: of each code in its segment, from 0."""
    return torch.arange(len(batch.segment_P)) - batch.spread(batch.start_S, 0)


def _stages(batch: TokenBatch, pattern: AttentionPattern) -> Tensor:
    """stage_S: how many segments with anything unknown stand before each in its document; 0 under full attention."""
    unknown_S = torch.zeros_like(batch.document_S)
    unknown_S[batch.segment_P[~batch.known_P]] = 0 if pattern.is_full else 1
    before_S = unknown_S.cumsum(0) - unknown_S
    first_D = torch.searchsorted(batch.document_S, torch.arange(batch.num_documents))
    return before_S - before_S[first_D][batch.document_S]


def _check_drafts(name: str, sampler: Sampler, pattern: AttentionPattern) -> None:
    if not pattern.is_full:
        raise ValueError(
            f"A model of {pattern} revises nothing, so it takes no Draft of {name!r}. Use a Masked segment."
        )
    if not {"draft_RN", "noise_R"} <= inspect.signature(sampler.start).parameters.keys():
        raise ValueError(
            f"The sampler of {name!r}, {sampler!r}, goes on from no Draft. Use a MaskSampler with remask, or an "
            "AncestralSampler."
        )


def _check_together(runs: Sequence[SamplerRun], steps: int | None, pattern: AttentionPattern) -> None:
    caches = {run.name: cache_for(run.sampler.cache_mode, pattern) for run in runs}
    if len(set(caches.values())) > 1:
        said = ", ".join(f"{name}: {cache}" for name, cache in caches.items())
        raise ValueError(f"cache must be the same for all tokenizers that are filled in together ({said})")
    if steps is not None:
        scheduled = [run for run in runs if not run.sampler.is_adaptive]
        if not scheduled:
            said = ", ".join(run.name for run in runs)
            raise ValueError(f"num_inference_steps {steps}, but the samplers of {said} find the number themselves")
        most = max(run.sample_RN.shape[1] for run in scheduled)
        if all(run.state.steps < steps for run in scheduled):
            raise ValueError(f"num_inference_steps {steps} is more than the {most} codes to fill in")
