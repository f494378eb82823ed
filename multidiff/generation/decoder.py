"""The decoding loop: masked tokens in, decided tokens out.

The `Decoder` asks the transformer for what all runs need, in one forward pass, and writes back what they decide.
Nothing here knows an item.

Tables stay on the CPU, where they are cheap to read. A step sends tokens and places to the transformer's device, and
reads back one small table for each tokenizer, the candidates. It waits for nothing else, except where
`suppress_tokens`, `forced_tokens` or lengths are set: then also for whether they left anything to draw.

Shape suffixes: P tokens of the batch, R documents that have unknown codes of a tokenizer, N such codes of a document,
M positions whose logits a step reads, V local ids, C codes that a step has changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from multidiff.generation.passes import Active, Passes
from multidiff.generation.runs import Decision, SamplerRun, places
from multidiff.models import MaskedDiffusionTransformer
from multidiff.samplers.blocks import cache_for
from multidiff.samplers.guidance import guide
from multidiff.sequence import MASK, SharedVocabulary, TokenBatch


class Decoder:
    """One batch on its way from masked to decided.

    Args:
        transformer, vocabulary: the denoiser and its layout.
        batch: the documents.
        runs: of `multidiff.generation.runs.make_runs`.
        nulls: null_P by condition, "" for all of them: the tokens that the null does not see.
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
        self.vocabulary, self.batch, self.runs, self.generators = vocabulary, batch, runs, generators
        self._device = transformer.device
        self._nulls = list(nulls)
        cache_mode = cache_for(runs[0].sampler.cache_mode, transformer.pattern)
        self._passes = Passes(transformer, vocabulary, batch, nulls, cache_mode, divergence)
        self.ids_P = torch.where(batch.known_P, batch.ids_P, MASK)
        for run in runs:
            self._write(run)
        self.nfe = [0] * batch.num_documents
        self.history: list[list[Decision]] | None = [[] for _ in self.nfe] if trace else None
        self._stages = [[run for run in runs if run.stage == stage] for stage in range(runs[-1].stage + 1)]
        self._stage, self._begun = 0, 0  # and the step at which it began
        self.steps = sum(max(run.state.steps for run in stage) for stage in self._stages)
        document_P = batch.document_P
        first_D = torch.searchsorted(batch.document_S, torch.arange(batch.num_documents))
        self._segment_P, self._place_P = batch.segment_P - first_D[document_P], places(batch)  # in document and segment
        self._guided = {key: set(document_P[null_P].tolist()) for key, null_P in nulls.items()}
        self._values: dict[str, list[Tensor]] = {}  # logits of the last pass: of the condition, then of each null
        self._needed_last: dict[int, set[str]] = {}  # the nulls that each document's logits are for

    def done(self, step: int) -> bool:
        """Whether this step would have nothing to do."""
        return self._stage + 1 == len(self._stages) and self._stage_done(step)

    def _stage_done(self, step: int) -> bool:
        return all(run.done(step - self._begun) for run in self._stages[self._stage])

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
        """As `Passes.divergence`."""
        return self._passes.divergence

    def step(self, step: int) -> None:
        """One step of every run of the stage that has one left, in one forward pass for all of them and their nulls.

        Logits of the step before are read again where nothing has changed since.
        """
        if self._stage_done(step) and self._stage + 1 < len(self._stages):
            self._stage, self._begun = self._stage + 1, step
        of_stage, index = self._stages[self._stage], step - self._begun
        active = [(run, run.sampler.needs(run.state)) for run in of_stage if not run.done(index)]
        scales = {run.name: self._scales(run, index) for run, _ in active}
        needed = self._needed(active, scales)
        stale = self._stale(active, needed)
        if stale:
            for document in stale:  # as if alone: the passes of others cost it nothing
                self.nfe[document] += 1 + len(needed[document])
            self._values = self._passes.logits(self.ids_P, self.runs, active, needed)
            self._needed_last |= needed
            for run in self.runs:  # a document that needs nothing stays fresh until it does
                run.fresh_R = run.fresh_R & torch.tensor([document not in needed for document in run.documents])
            for run, where_RN in active:
                run.where_RN = where_RN
        for run, where_RN in active:
            before_RN = run.sample_RN
            self._decide(run, where_RN, index, scales[run.name])
            if self.history is not None:
                self._record(step, run, before_RN, self.history)

    def _scales(self, run: SamplerRun, step: int) -> dict[str, Tensor]:
        """scale_R of each condition; 1 where the document gives none."""
        scales = {}
        for key, scale in run.scales.items():
            scale_R = run.sampler.guidance_at(scale, step, run.state)
            guided = [document in self._guided.get(key, ()) for document in run.documents]
            scales[key] = torch.where(torch.tensor(guided), scale_R, 1.0)
        return scales

    def _needed(self, active: Active, scales: Mapping[str, Mapping[str, Tensor]]) -> dict[int, set[str]]:
        """The documents that need logits, and the conditions whose nulls they need."""
        needed: dict[int, set[str]] = {}
        for run, where_RN in active:
            guides = {key: (scale_R != 1).tolist() for key, scale_R in scales[run.name].items()}
            for row in torch.nonzero(where_RN.any(1)).flatten().tolist():
                keys = {key for key, of_row in guides.items() if of_row[row]}
                needed[run.documents[row]] = needed.get(run.documents[row], set()) | keys
        return needed

    def _stale(self, active: Active, needed: Mapping[int, set[str]]) -> set[int]:
        """The documents whose logits have to be computed."""
        stale = {document for document, keys in needed.items() if keys != self._needed_last.get(document)}
        for run in self.runs:  # under another null nothing that was cached will do
            another = torch.tensor([document in stale for document in run.documents])
            run.block_R = run.block_R.masked_fill(another, -1)
        changed = {run.documents[row] for run in self.runs for row in torch.nonzero(run.fresh_R).flatten().tolist()}
        stale |= changed & needed.keys()
        for run, where_RN in active:
            more_R = (where_RN & ~run.where_RN).any(1)
            stale |= {run.documents[row] for row in torch.nonzero(more_R).flatten().tolist()}
        return stale

    def _decide(self, run: SamplerRun, where_RN: Tensor, step: int, scales: Mapping[str, Tensor]) -> None:
        row_M = torch.nonzero(where_RN)[:, 0]
        values = self._values.get(run.name)
        if values is None:
            values = [torch.empty(0, run.state.mask_token_id, device=self._device)] * (1 + len(self._nulls))
        elif not torch.equal(where_RN, run.where_RN):  # what is read has become less
            kept = self._sent(torch.nonzero(where_RN[run.where_RN]).flatten())
            values = [value_MV[kept] for value_MV in values]
        conditional_MV, *unconditional = values
        null_of = dict(zip(self._nulls, unconditional, strict=True))
        nulls = [
            (null_of[key], self._sent(scale_R[row_M, None]).to(conditional_MV.dtype))
            for key, scale_R in scales.items()
            if key in null_of and bool((scale_R != 1).any())
        ]
        logits_MV = guide(conditional_MV, nulls)
        inside = torch.nonzero(run.inside_RN[where_RN]).flatten()
        if len(inside):
            eos = self.vocabulary.eos_ids(run.name, run.state.levels_RN[where_RN][inside])
            logits_MV = logits_MV.index_put((self._sent(inside), self._sent(eos)), logits_MV.new_full((), -torch.inf))
        output = run.sampler.step(
            logits_MV,
            run.state.steps - 1 - step,
            run.sample_RN,
            where=where_RN,
            state=run.state,
            generator=[self.generators[document] for document in run.documents],
        )
        run.fresh_R = run.fresh_R | (output.prev_sample != run.sample_RN).any(1)
        if self._passes.reads_noise:
            run.fresh_R = run.fresh_R | (output.state.noise_R != run.state.noise_R)
        run.sample_RN, run.state = output.prev_sample, output.state
        self._write(run)

    def _write(self, run: SamplerRun) -> None:
        there_RN, masked_RN = run.sample_RN >= 0, run.sample_RN == run.state.mask_token_id
        decided_RN = run.sample_RN.where(there_RN & ~masked_RN, 0)
        shared_RN = self.vocabulary.to_shared(run.name, decided_RN, run.state.levels_RN).masked_fill(masked_RN, MASK)
        self.ids_P[run.place_RN[there_RN]] = shared_RN[there_RN]

    def _record(self, step: int, run: SamplerRun, before_RN: Tensor, history: list[list[Decision]]) -> None:
        """Add what a step has changed, in the order of places."""
        changed_RN = run.sample_RN != before_RN
        at_C, token_C, p_C = run.place_RN[changed_RN], run.sample_RN[changed_RN], run.state.probs_RN[changed_RN]
        row_C = torch.nonzero(changed_RN)[:, 0]
        token_C = token_C.masked_fill(token_C == run.state.mask_token_id, -1)
        columns = (row_C, self._segment_P[at_C], self._place_P[at_C], token_C, p_C)
        for row, segment, place, token, p in zip(*(column.tolist() for column in columns), strict=True):
            history[run.documents[row]].append(Decision(step, segment, place, token, p))

    def _sent(self, table: Tensor) -> Tensor:
        """A table on the transformer's device, without waiting for what is still computed there."""
        return table.to(self._device, non_blocking=True)
