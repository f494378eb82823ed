"""The decoding loop: masked tokens in, decided tokens out.

A `SamplerRun` is one tokenizer's unknown positions in a compact table, for its sampler; the `Decoder` asks the
transformer for what all runs need, in one forward pass, and writes back what they decide. Nothing here knows an item.

Tables stay on the CPU, where they are cheap to read; only what the transformer sees and its logits are on its device.
A step sends tokens and places there, and reads back one small table for each tokenizer, the candidates. It waits for
nothing else, but where `suppress_tokens`, `forced_tokens` or lengths are set for whether they left anything to draw.

Shape suffixes: B rows = documents, L row length, P = B·L, S segments or selected rows, R documents that have unknown
codes of a tokenizer, N such codes of a document, M positions whose logits a step reads, V local ids, A columns computed
anew, C codes that a step has changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from multidiff.models.transformer import KeyValueCache, MaskedDiffusionTransformer
from multidiff.samplers import Sampler, SamplerState
from multidiff.samplers.guidance import guide
from multidiff.sequence.sequencer import TokenBatch
from multidiff.sequence.vocabulary import MASK, SharedVocabulary


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


@dataclass
class SamplerRun:
    """One tokenizer's unknown positions: a row for each document that has any.

    Attributes:
        name, sampler: of the tokenizer.
        scales: guidance scale by tokenizer whose given segments guide; "" for all of them together.
        documents: of each row.
        place_RN: flat position in B·L; 0 at padding.
        inside_RN: where a stop cannot be drawn: before the end of codes whose end is known. Elsewhere the sampler keeps
            the codes of a frame together.
        sample_RN, state: as the sampler has them.
        fresh_R: whether the row has changed since its last forward pass.
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
    fresh_R: Tensor = field(init=False)
    block_R: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.fresh_R = torch.ones(len(self.documents), dtype=torch.bool)
        self.block_R = torch.full_like(self.place_RN[:, 0], -1)

    def done(self, step: int) -> bool:
        """Whether this step would have nothing to do; only adaptive counts end before their last step."""
        return step >= self.state.steps or (self.sampler.is_adaptive and not bool(self.state.undecided_RN.any()))


def make_runs(
    batch: TokenBatch,
    inside_S: Tensor,
    unit_S: Tensor,
    vocabulary: SharedVocabulary,
    samplers: Mapping[str, Sampler],
    generators: Sequence[torch.Generator],
    steps: int | None = None,
    scale: float | Mapping[str, float] | None = None,
) -> list[SamplerRun]:
    """The runs of a batch.

    Args:
        batch: a row for each document, on the CPU.
        inside_S: how many codes of each segment a stop cannot end.
        unit_S: how many codes each segment has in a unit; they stop together.
        vocabulary, samplers: of the tokenizers.
        generators: one per document.
        steps, scale: for all of them; None takes each sampler's own.

    Raises:
        ValueError: more steps than codes, steps for counts that find their own, samplers that cannot run together.
    """
    runs = []
    unknown_P = ~batch.known_BL.flatten()
    segment_P = batch.segment_BL.clamp_min(0).flatten()
    tokenizer_P = batch.tokenizer_S[segment_P]
    document_P, span_P = batch.document_BL.flatten(), batch.span_BL.flatten()
    place_P = _places(batch)
    inside_P = place_P < inside_S[segment_P]
    extent_S3 = torch.zeros(len(batch.document_S), 3, dtype=torch.int64)
    index_P3 = segment_P[:, None].expand(-1, 3)
    extent_S3 = extent_S3.scatter_reduce(0, index_P3, batch.coords_BL3.flatten(0, 1) + 1, "amax")
    for place, (name, spans) in enumerate(vocabulary.spans.items()):
        flat_U = torch.nonzero(unknown_P & (tokenizer_P == place)).flatten()
        if not len(flat_U):
            continue
        sampler, varies = samplers[name], vocabulary.tokenizers[name].variable_length
        rows, row_U, count_R = torch.unique(document_P[flat_U], return_inverse=True, return_counts=True)
        order_U = torch.argsort(row_U, stable=True)
        column_U = torch.arange(len(flat_U)) - (count_R.cumsum(0) - count_R)[row_U[order_U]]
        shape = (len(rows), int(count_R.max()))
        index = (row_U[order_U], column_U)
        place_RN = torch.zeros(shape, dtype=torch.int64)
        place_RN[index] = flat_U[order_U]
        sample_RN = torch.full_like(place_RN, -1)
        sample_RN[index] = max(stop - start for start, stop in spans)
        levels_RN = (span_P[place_RN] - vocabulary.first_span[name]).where(sample_RN >= 0, 0)
        coords_RN3 = batch.coords_BL3.flatten(0, 1)[place_RN]
        inside_RN = inside_P[place_RN] & (sample_RN >= 0) & varies
        eos_RN = vocabulary.eos_ids(name, levels_RN).masked_fill(inside_RN, -1) if varies else None
        frame_RN = None
        if varies and bool((unit_S[batch.tokenizer_S == place] > 1).any()):
            unit_U = place_P[flat_U] // unit_S[segment_P[flat_U]]
            frame_U = torch.unique(segment_P[flat_U] * len(segment_P) + unit_U, return_inverse=True)[1]
            frame_RN = torch.full_like(place_RN, -1)
            frame_RN[index] = frame_U[order_U]
        state = sampler.start(
            sample_RN,
            levels_RN,
            coords_RN3,
            num_inference_steps=None if sampler.is_adaptive else steps,
            eos_RN=eos_RN,
            extent_RN3=extent_S3[segment_P[place_RN]],
            frame_RN=frame_RN,
            generator=[generators[document] for document in rows.tolist()],
        )
        strength = sampler.guidance_scale if scale is None else scale
        scales = strength if isinstance(strength, Mapping) else {"": strength}
        runs.append(SamplerRun(name, sampler, scales, rows.tolist(), place_RN, inside_RN, sample_RN, state))
    _check_together(runs, steps)
    return runs


def _check_together(runs: Sequence[SamplerRun], steps: int | None) -> None:
    caches = {run.name: run.sampler.cache_mode for run in runs}
    if len(set(caches.values())) > 1:
        said = ", ".join(f"{name}: {cache}" for name, cache in caches.items())
        raise ValueError(f"cache must be the same for all tokenizers that are filled in together ({said})")
    if steps is not None:
        fixed = [run for run in runs if not run.sampler.is_adaptive]
        if not fixed:
            said = ", ".join(run.name for run in runs)
            raise ValueError(f"num_inference_steps {steps}, but unmasking finds the number itself ({said})")
        if steps > max(run.state.steps for run in fixed):
            most = max(run.sample_RN.shape[1] for run in fixed)
            raise ValueError(f"num_inference_steps {steps} is more than the {most} codes to fill in")


@dataclass
class _Logits:
    """What a forward pass gave."""

    keys: tuple[str, ...]  # of the nulls
    where: dict[str, Tensor]
    values: dict[str, list[Tensor]]  # by tokenizer: logits_MV of the condition, then of each null

    def holds(self, keys: tuple[str, ...], where: Mapping[str, Tensor]) -> bool:
        """Whether these are the logits of such a pass, if no token has changed."""
        return keys == self.keys and all(
            name in self.where and torch.equal(where_RN, self.where[name]) for name, where_RN in where.items()
        )


class Decoder:
    """One batch on its way from masked to decided.

    Args:
        transformer, vocabulary: the denoiser and its layout.
        batch: a row for each document, on the CPU.
        runs: of `gather`.
        nulls: null_BL by condition, on the CPU, "" for all of them: the tokens that the null does not see.
        generators: one per document.
        trace: keep `history`.
        divergence: compare the logits of a cached pass with those of a whole one, at the cost of that.

    Attributes:
        ids_P: shared ids, `<mask>` where undecided; on the CPU.
        nfe: forward passes of each document.
        history: what was decided when, document by document; None without `trace`.
    """

    def __init__(
        self,
        transformer: MaskedDiffusionTransformer,
        vocabulary: SharedVocabulary,
        batch: TokenBatch,
        runs: Sequence[SamplerRun],
        nulls: Mapping[str, Tensor],
        generators: Sequence[torch.Generator],
        trace: bool = False,
        divergence: bool = False,
    ):
        self.transformer, self.vocabulary, self.batch = transformer, vocabulary, batch
        self.runs, self.nulls, self.generators = runs, nulls, generators
        self._device = transformer.device
        self._on_device = batch.to(self._device)
        self.ids_P = torch.where(batch.known_BL, batch.ids_BL, MASK).flatten()
        self.nfe = [0] * batch.num_documents
        self.history: list[list[Decision]] | None = [[] for _ in self.nfe] if trace else None
        number_D = torch.bincount(batch.document_S, minlength=batch.num_documents)
        number_S = torch.arange(len(batch.document_S)) - (number_D.cumsum(0) - number_D)[batch.document_S]
        self._number_P = number_S[batch.segment_BL.clamp_min(0)].flatten()  # of the segment in its document
        self._place_P = _places(batch)
        self.steps = max(run.state.steps for run in runs)
        self._guided = {key: set(batch.document_BL[null_BL].tolist()) for key, null_BL in nulls.items()}
        self._mode = runs[0].sampler.cache_mode
        self._cache = KeyValueCache()
        self._last: _Logits | None = None
        self._asked_last: dict[int, set[str]] = {}  # the nulls that each document's logits are for
        self._compare = divergence
        self._differences: list[Tensor] = []

    def done(self, step: int) -> bool:
        """Whether this step would have nothing to do."""
        return all(run.done(step) for run in self.runs)

    @property
    def probs_P(self) -> Tensor:
        """float64: the probability of each token when it was decided; NaN where it was known."""
        probs_P = torch.full(self.ids_P.shape, torch.nan, dtype=torch.float64)
        for run in self.runs:
            there_RN = run.sample_RN >= 0
            probs_P[run.place_RN[there_RN]] = run.state.probs_RN[there_RN]
        return probs_P

    @property
    def divergence(self) -> float | None:
        """Mean total variation, ½ Σ |p - q|, between the distributions with and without cache, over all that a cached
        pass was asked for; None where it was not measured."""
        if not self._compare:
            return None
        return float(torch.cat(self._differences).mean()) if self._differences else 0.0

    def step(self, step: int) -> None:
        """One step of every run that has one left, in one forward pass for all of them and their nulls.

        Logits of the step before are read again where nothing has changed since.
        """
        active = [(run, run.sampler.needs(run.state)) for run in self.runs if not run.done(step)]
        scales = {run.name: self._scales(run, step) for run, _ in active}
        where = {run.name: where_RN for run, where_RN in active}
        asked = self._asked(active, scales)
        keys = tuple(sorted(set().union(*asked.values())))
        logits = self._last
        if not asked:
            sizes = {run.name: run.state.mask_token_id for run, _ in active}
            nothing = {name: [torch.empty(0, size, device=self._device)] for name, size in sizes.items()}
            logits = _Logits((), where, nothing)
        elif logits is None or not logits.holds(keys, where) or self._fresh() & asked.keys():
            for run in self.runs:
                # Under another null nothing that was computed before will do.
                anew = [asked.get(document) not in (None, self._asked_last.get(document)) for document in run.documents]
                anew_R = torch.tensor(anew)
                run.fresh_R, run.block_R = run.fresh_R | anew_R, run.block_R.masked_fill(anew_R, -1)
            for document in self._fresh() & asked.keys():  # as if alone: the passes of others cost it nothing
                self.nfe[document] += 1 + len(asked[document])
            logits = _Logits(keys, where, self._forward(keys, active))
            self._asked_last = {**self._asked_last, **asked}
            for run in self.runs:  # a document that asks for nothing stays fresh until it does
                run.fresh_R = run.fresh_R & torch.tensor([document not in asked for document in run.documents])
        self._last = logits
        for run, where_RN in active:
            before_RN = run.sample_RN
            self._decide(run, where_RN, step, logits, scales[run.name])
            if self.history is not None:
                self._record(step, run, before_RN, self.history)

    def _fresh(self) -> set[int]:
        """The documents that have changed since their last forward pass."""
        return {run.documents[row] for run in self.runs for row in torch.nonzero(run.fresh_R).flatten().tolist()}

    def _scales(self, run: SamplerRun, step: int) -> dict[str, Tensor]:
        """scale_R of each condition; 1 where the document gives none."""
        scales = {}
        for key, scale in run.scales.items():
            scale_R = run.sampler.guidance_at(scale, step, run.state)
            guided = [document in self._guided.get(key, ()) for document in run.documents]
            scales[key] = torch.where(torch.tensor(guided), scale_R, 1.0)
        return scales

    def _asked(
        self, active: Sequence[tuple[SamplerRun, Tensor]], scales: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[int, set[str]]:
        """The documents that need logits, and the conditions whose nulls they need."""
        asked: dict[int, set[str]] = {}
        for run, where_RN in active:
            guides = {key: (scale_R != 1).tolist() for key, scale_R in scales[run.name].items()}
            for row in torch.nonzero(where_RN.any(1)).flatten().tolist():
                keys = {key for key, of_row in guides.items() if of_row[row]}
                asked[run.documents[row]] = asked.get(run.documents[row], set()) | keys
        return asked

    def _decide(
        self, run: SamplerRun, where_RN: Tensor, step: int, logits: _Logits, scales: Mapping[str, Tensor]
    ) -> None:
        conditional_MV, *unconditional = logits.values[run.name]
        row_M = torch.nonzero(where_RN)[:, 0]
        sent = {key: self._sent(scales[key][row_M, None]) for key in logits.keys if key in scales}
        guided = {key: scale_M1.to(conditional_MV.dtype) for key, scale_M1 in sent.items()}
        null_of = dict(zip(logits.keys, unconditional, strict=True))
        logits_MV = guide(conditional_MV, [(null_of[key], scale_M1) for key, scale_M1 in guided.items()])
        inside = torch.nonzero(run.inside_RN[where_RN]).flatten()
        if len(inside):
            stops = self.vocabulary.eos_ids(run.name, run.state.levels_RN[where_RN][inside])
            logits_MV = logits_MV.index_put((self._sent(inside), self._sent(stops)), logits_MV.new_full((), -torch.inf))
        output = run.sampler.step(
            logits_MV,
            run.state.steps - 1 - step,
            run.sample_RN,
            where=where_RN,
            state=run.state,
            generator=[self.generators[document] for document in run.documents],
        )
        run.fresh_R = run.fresh_R | (output.prev_sample != run.sample_RN).any(1)
        run.sample_RN, run.state = output.prev_sample, output.state
        there_RN, masked_RN = run.sample_RN >= 0, run.sample_RN == run.state.mask_token_id
        decided_RN = run.sample_RN.where(there_RN & ~masked_RN, 0)
        shared_RN = self.vocabulary.to_shared(run.name, decided_RN, run.state.levels_RN).masked_fill(masked_RN, MASK)
        self.ids_P[run.place_RN[there_RN]] = shared_RN[there_RN]

    def _sent(self, table: Tensor) -> Tensor:
        """A table on the transformer's device, without waiting for what is still computed there."""
        return table.to(self._device, non_blocking=True)

    def _forward(self, keys: tuple[str, ...], active: Sequence[tuple[SamplerRun, Tensor]]) -> dict[str, list[Tensor]]:
        """Local log-probabilities by tokenizer: logits_MV of the condition, then of each null."""
        documents = torch.zeros(self.batch.num_documents, dtype=torch.bool)
        for run, where_RN in active:
            documents[torch.tensor(run.documents)] |= where_RN.any(1)
        if self._mode == "none":
            return self._logits(keys, active, [(torch.nonzero(documents).flatten(), None)])
        begins, active_BL = torch.zeros_like(documents), torch.zeros_like(self.batch.known_BL)
        for run in self.runs:  # those that are done as well: their last block has changed since it was cached
            block_R = run.state.current_block_R
            row_R = torch.tensor(run.documents)
            passes_R = documents[row_R]
            begins[row_R] |= passes_R & (block_R != run.block_R)
            run.block_R = torch.where(passes_R, block_R, run.block_R)
            current_RN = run.state.block_RN == block_R[:, None]
            active_BL.view(-1)[run.place_RN[current_RN]] = True
        if self._mode == "approximate_prefix":
            active_BL = active_BL.cumsum(1) > 0
        passes: list[tuple[Tensor, Tensor | None]] = []
        if bool(begins.any()):
            passes.append((torch.nonzero(begins).flatten(), None))
        row_S = torch.nonzero(documents & ~begins).flatten()
        if len(row_S):
            # The columns first, then the last of them again and again.
            active_SL = active_BL[row_S]
            number_S1 = active_SL.sum(1, keepdim=True)
            order_SL = active_SL.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
            column_A = torch.arange(int(number_S1.max()))
            passes.append((row_S, order_SL.gather(1, torch.minimum(column_A[None], number_S1 - 1))))
        logits = self._logits(keys, active, passes)
        if self._compare and len(row_S):
            whole = self._logits(keys, active, [(row_S, None)], keep=False)
            for run, where_RN in active:
                of_M = torch.tensor(run.documents)[torch.nonzero(where_RN)[:, 0]]
                cached = self._sent(torch.nonzero(torch.isin(of_M, row_S)).flatten())
                difference_MV = logits[run.name][0].exp() - whole[run.name][0].exp()
                self._differences.append(difference_MV[cached].abs().sum(-1) / 2)
        return logits

    def _logits(
        self,
        keys: tuple[str, ...],
        active: Sequence[tuple[SamplerRun, Tensor]],
        passes: Sequence[tuple[Tensor, Tensor | None]],
        keep: bool = True,
    ) -> dict[str, list[Tensor]]:
        """Logits of what the runs ask for, where the passes reach; -inf beyond a level's span.

        Args:
            passes: row_S, and active_SA, the columns computed anew, or None for whole rows.
            keep: whether the keys and values of whole rows replace the cached ones.
        """
        there, (rows, length) = self._on_device, self.batch.ids_BL.shape
        exact = torch.float64 if self.transformer.dtype == torch.float64 else torch.float32
        ids_BL = self.ids_P.view(rows, length)
        seen = [ids_BL, *(torch.where(self.nulls[key], MASK, ids_BL) for key in keys)]
        places = {run.name: run.place_RN[where_RN] for run, where_RN in active}
        levels = {run.name: run.state.levels_RN[where_RN] for run, where_RN in active}
        numbers = [0, *(1 + list(self.nulls).index(key) for key in keys)]  # a cache keeps a place for every null
        shapes = {run.name: (len(places[run.name]), run.state.mask_token_id) for run, _ in active}
        gathered = {
            name: [torch.full(shape, -torch.inf, dtype=exact, device=self._device) for _ in seen]
            for name, shape in shapes.items()
        }
        for row_S, active_SA in passes:
            width = length if active_SA is None else active_SA.shape[1]
            new_B = torch.full((rows,), -1)
            new_B[row_S] = torch.arange(len(row_S))
            queries, entries = [], []
            for name, level, span in self.vocabulary.flat_spans:
                entry_N = place_N = torch.empty(0, dtype=torch.int64)
                if name in places:
                    reached_M = (levels[name] == level) & (new_B[places[name] // length] >= 0)
                    entry_N = torch.nonzero(reached_M).flatten()
                    place_N = places[name][entry_N]
                new_N, column_N = new_B[place_N // length], place_N % length
                if active_SA is not None:
                    column_N = (active_SA[new_N] == column_N[:, None]).to(torch.int8).argmax(1)
                offset_U1 = torch.arange(len(seen))[:, None] * len(row_S) * width
                queries.append((self._sent((offset_U1 + new_N * width + column_N).flatten()), span))
                entries.append(self._sent(entry_N))
            cached_S = self._sent(torch.cat([number * rows + row_S for number in numbers]))
            document_S = self._sent(row_S)
            cache = None
            if self._mode != "none" and keep:
                cache = KeyValueCache() if active_SA is None else self._cache.select(cached_S)
            logits = self.transformer(
                self._sent(torch.cat([ids_BL[row_S] for ids_BL in seen])),
                there.positions_BL3[document_S].repeat(len(seen), 1, 1),
                there.document_BL[document_S].repeat(len(seen), 1),
                queries,
                there.coords_BL3[document_S].repeat(len(seen), 1, 1),
                cache,
                None if active_SA is None else self._sent(active_SA.repeat(len(seen), 1)),
            )
            if cache is not None and active_SA is None:
                self._cache.update(cached_S, cache, rows * (1 + len(self.nulls)))
            for (name, _, (start, stop)), entry_N, logits_NV in zip(
                self.vocabulary.flat_spans, entries, logits, strict=True
            ):
                parts = logits_NV.view(len(seen), len(entry_N), stop - start)
                for whole_MV, part_NV in zip(gathered.get(name, ()), parts, strict=False):
                    whole_MV[entry_N, : stop - start] = torch.log_softmax(part_NV.to(exact), -1)
        return gathered

    def _record(self, step: int, run: SamplerRun, before_RN: Tensor, history: list[list[Decision]]) -> None:
        """Add what a step has changed, in the order of places."""
        changed_RN = run.sample_RN != before_RN
        place_C, token_C, p_C = run.place_RN[changed_RN], run.sample_RN[changed_RN], run.state.probs_RN[changed_RN]
        row_C = torch.nonzero(changed_RN)[:, 0]
        token_C = token_C.masked_fill(token_C == run.state.mask_token_id, -1)
        columns = (row_C, self._number_P[place_C], self._place_P[place_C], token_C, p_C)
        for row, segment, place, token, p in zip(*(column.tolist() for column in columns), strict=True):
            history[run.documents[row]].append(Decision(step, segment, place, token, p))


def _places(batch: TokenBatch) -> Tensor:
    """place_P: of each code in its segment, from 0; the tokens of a segment follow one another."""
    segment_P, flat_P = batch.segment_BL.flatten(), torch.arange(batch.segment_BL.numel())
    first_S = torch.full_like(batch.document_S, len(flat_P))
    first_S = first_S.scatter_reduce(0, segment_P.clamp_min(0), flat_P.where(segment_P >= 0, len(flat_P)), "amin")
    return flat_P - first_S[segment_P.clamp_min(0)]
