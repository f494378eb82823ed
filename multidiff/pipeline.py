"""A document with blanks in, the same document filled in out.

    pipe = MultiDiffPipeline.from_pretrained("runs/demo/model")
    out = pipe([[Given("text", "seven"), Blank("image"), Blank("speech")]], generator=torch.Generator().manual_seed(0))
    out.documents[0][1].item.save("seven.png")

Any combination of modalities may be given and blank. Every tokenizer's blanks are filled by a sampler of its own, all
in the same forward passes.

Shape suffixes: B rows, L row length, R documents that have unknown codes of a tokenizer, N such codes of a document,
M positions whose logits a step reads, V local ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from diffusers import AmusedScheduler, BlockRefinementScheduler, DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from multidiff import saving
from multidiff.samplers import MaskSampler, State, as_sampler
from multidiff.samplers.count import ADAPTIVE
from multidiff.samplers.guidance import guide, scale_at
from multidiff.sequence import Segment, Sequencer, TokenBatch
from multidiff.tokenizer import Codes, ModalityTokenizer
from multidiff.transformer import MaskedDiffusionTransformer
from multidiff.vocabulary import MASK, SharedVocabulary


class Given:
    """A segment that is there: `Given("text", "seven")`, `Given("image", PIL.Image.open("x.png"))`."""

    def __init__(self, tokenizer: str, item: Any):
        self.tokenizer = tokenizer
        self.item = item


class Blank:
    """A segment to fill in: `Blank("image", height=32, width=48)`; a size not given is that of the saved sampler
    settings (`canvas`), else the tokenizer's default.

    Where length varies, the size is room, not length: the model decides where in it the content ends.
    """

    def __init__(self, tokenizer: str, **size: int):
        self.tokenizer = tokenizer
        self.size = size


class Partial:
    """A segment to fill in where `known_N` is False; known codes come back as they are.

    `multidiff.editing` makes them: masked spans, regions of pictures, gaps in sounds, continuations.

    Args:
        codes: as `tokenizer.encode` returns them; arbitrary valid ids where unknown.
        known_N: bool, one for each code.
        room: where length varies, units (tokens, frames) after the codes to fill in as well; the content ends where
            the model decides within them. With 0 it ends where the codes do.
    """

    def __init__(self, tokenizer: str, codes: Codes, known_N: Tensor, room: int = 0):
        self.tokenizer = tokenizer
        self.codes = codes
        self.known_N = known_N
        self.room = room


@dataclass(frozen=True)
class Filled:
    """A segment of a filled document.

    Attributes:
        tokenizer: its name.
        item: what its codes decode to; for a `Given`, what was given.
        codes: its codes.
        p_N: float64, the probability of each code when it was decided; NaN where it was known.
    """

    tokenizer: str
    item: Any
    codes: Codes
    p_N: Tensor


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
class MultiDiffOutput(BaseOutput):
    """What the pipeline returns.

    Attributes:
        documents: the documents, filled in.
        nfe: forward passes of the denoiser that each document took; a step counts 1 more for each guiding condition.
        trace: what was decided when, document by document; None where it was not asked for.
    """

    documents: list[list[Filled]]
    nfe: list[int]
    trace: list[list[Decision]] | None = None


@dataclass
class _Run:
    """One tokenizer's blanks during sampling."""

    name: str
    sampler: MaskSampler
    scales: Mapping[str, float]  # by tokenizer whose given segments guide; "" for all of them together
    documents: list[int]  # of each row
    place_RN: Tensor  # flat position in B·L; 0 at padding
    inside_RN: Tensor  # before the end of a `Partial`'s codes, if length varies: a stop cannot be drawn
    sample_RN: Tensor
    state: State
    fresh_R: Tensor  # whether the row has changed since its last forward pass

    def done(self, step: int) -> bool:
        """Whether this step would have nothing to do; only adaptive counts end before their last step."""
        adaptive = self.sampler.config["count"] in ADAPTIVE
        return step >= self.state.steps or (adaptive and not bool(self.state.undecided_RN.any()))

    def scales_at(self, step: int) -> dict[str, float]:
        """Those that are not 1."""
        schedule = self.sampler.config["guidance_schedule"]
        scales = {key: scale_at(scale, schedule, step, self.state.steps) for key, scale in self.scales.items()}
        return {key: scale for key, scale in scales.items() if scale != 1}


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


class MultiDiffPipeline(DiffusionPipeline):
    """Fills in documents.

    Args:
        transformer: the denoiser.
        vocabulary: the layout that it was trained with.
        tokenizers: live tokenizers by name, matching the vocabulary.
        samplers: a sampler, or a scheduler of diffusers, for each tokenizer; a missing one gets `MaskSampler()`.
    """

    def __init__(
        self,
        transformer: MaskedDiffusionTransformer,
        vocabulary: SharedVocabulary,
        tokenizers: Mapping[str, ModalityTokenizer],
        samplers: Mapping[str, MaskSampler | AmusedScheduler | BlockRefinementScheduler] | None = None,
    ):
        super().__init__()
        vocabulary.check(SharedVocabulary.of(tokenizers), "the set of tokenizers")
        if transformer.config["vocabulary_rows"] != vocabulary.rows:
            raise ValueError(
                f"the transformer has {transformer.config['vocabulary_rows']} rows, its vocabulary {vocabulary.rows}"
            )
        for name in samplers or {}:
            vocabulary.layout(name)
        self.register_modules(transformer=transformer)
        self.transformer: MaskedDiffusionTransformer = transformer
        self.vocabulary = vocabulary
        self.tokenizers = dict(tokenizers)
        self.samplers = {
            name: as_sampler((samplers or {}).get(name) or MaskSampler()) for name in vocabulary.tokenizers
        }
        self.sequencer = Sequencer(tokenizers, vocabulary)

    @property
    def components(self) -> dict[str, Any]:
        """What diffusers moves and lists: the transformer; it knows no other kind of part that is here."""
        return {"transformer": self.transformer}

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the transformer, and the tokenizers to its device."""
        super().to(*args, **kwargs)
        for tokenizer in self.tokenizers.values():
            tokenizer.to(self.transformer.device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        documents: Sequence[Sequence[Given | Blank | Partial]],
        num_inference_steps: int | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback_on_step_end: Callable[[MultiDiffPipeline, int, int, dict[str, Any]], Any] | None = None,
        trace: bool = False,
    ) -> MultiDiffOutput:
        """Fill in the blanks of a batch of documents.

        Args:
            documents: lists of `Given`, `Blank` and `Partial` segments, at least one of them with something unknown.
            num_inference_steps: steps for every tokenizer whose count does not find its own; None takes each sampler's.
            guidance_scale: classifier-free guidance for every tokenizer, 1 is none; None takes each sampler's own.
                The null is the document with its given segments masked; with {tokenizer: scale}, one null for each,
                with that tokenizer's masked. A document without any is not guided by a saved scale, and refused with
                one that is asked for here.
            generator: one per document, for samples that do not depend on the batch; or one for all; None draws a
                fresh seed. torch's global generator is never touched.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"documents": …})` after every step, with
                the documents as lists of `multidiff.sequence.Segment`, `known_N` True where decided.
            trace: also return what was decided when.

        Raises:
            ValueError: an unknown tokenizer, a size that does not fit, nothing to fill in, guidance where a document
                gives no condition, more steps than there are codes to fill in, a number of generators other than that
                of documents.
        """
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        generators = _generators(generator, len(documents))
        segments = self._segments(documents)
        batch = self.sequencer.batch(segments).to(self.transformer.device)
        inside = [len(part.codes) if isinstance(part, Partial) else 0 for document in documents for part in document]
        inside_S = torch.tensor(inside, device=batch.ids_BL.device)
        runs = self._runs(batch, inside_S, num_inference_steps, guidance_scale)
        conditions = {key for run in runs for key, scale in run.scales.items() if scale != 1}
        nulls = {key: self._null(key, batch, segments, guidance_scale is not None) for key in sorted(conditions)}
        ids_P = torch.where(batch.known_BL, batch.ids_BL, MASK).flatten()
        nfe = [0] * len(documents)
        history: list[list[Decision]] | None = [[] for _ in documents] if trace else None
        steps = max(run.state.steps for run in runs)
        logits: _Logits | None = None
        with self.progress_bar(total=steps) as bar:  # pyright: ignore[reportCallIssue]
            for step in range(steps):
                before = [run.sample_RN for run in runs]
                logits = self._step(step, runs, ids_P, nulls, batch, generators, nfe, logits)
                if history is not None:
                    _record(step, runs, before, batch, history)
                if callback_on_step_end is not None:
                    current = self._current(batch, segments, ids_P)
                    callback_on_step_end(self, step, steps - 1 - step, {"documents": current})
                bar.update()
                if all(run.done(step + 1) for run in runs):
                    break
        p_P = torch.full(ids_P.shape, torch.nan, dtype=torch.float64, device=ids_P.device)
        for run in runs:
            there_RN = run.sample_RN >= 0
            p_P[run.place_RN[there_RN]] = run.state.p_RN[there_RN]
        current = self._current(batch, segments, ids_P)
        return MultiDiffOutput(self._decode(documents, current, _by_segment(p_P, batch)), nfe, history)

    def _segments(self, documents: Sequence[Sequence[Given | Blank | Partial]]) -> list[list[Segment]]:
        if not documents:
            raise ValueError("no documents to fill in")
        given = [part for document in documents for part in document if isinstance(part, Given)]
        codes: dict[int, Codes] = {}
        for name in {part.tokenizer: None for part in given}:
            self.vocabulary.layout(name)
            parts = list({id(part): part for part in given if part.tokenizer == name}.values())
            encoded = self.tokenizers[name].encode([part.item for part in parts])
            codes |= {id(part): code for part, code in zip(parts, encoded, strict=True)}
        segments = []
        for number, document in enumerate(documents):
            row = []
            for part in document:
                if isinstance(part, Given):
                    row.append(self.sequencer.given(part.tokenizer, codes[id(part)]))
                elif isinstance(part, Blank):
                    row.append(self.sequencer.blank(part.tokenizer, self._blank_size(part)))
                elif isinstance(part, Partial):
                    row.append(self._partial(part))
                else:
                    raise ValueError(f"document {number}: {part!r} is no Given, Blank or Partial segment")
            if all(bool(segment.known_N.all()) for segment in row):
                raise ValueError(f"document {number} has nothing to fill in: give it a Blank or a Partial segment")
            segments.append(row)
        return segments

    def _partial(self, part: Partial) -> Segment:
        if part.known_N.shape != part.codes.ids_N.shape or part.known_N.dtype != torch.bool:
            raise ValueError(
                f"Partial({part.tokenizer!r}): known_N must be bool, one for each of {len(part.codes)} codes"
            )
        varies = self.vocabulary.layout(part.tokenizer).variable_length
        if part.room < 0 or (part.room and not varies):
            raise ValueError(f"Partial({part.tokenizer!r}): room {part.room} must be 0, or more where length varies")
        segment = self.sequencer.given(part.tokenizer, part.codes, max(1, part.room))
        known_N = torch.full_like(segment.known_N, not part.room)
        known_N[: len(part.codes)] = part.known_N
        return replace(segment, known_N=known_N)

    def _blank_size(self, part: Blank) -> dict[str, int]:
        self.vocabulary.layout(part.tokenizer)
        return {**(self.samplers[part.tokenizer].config.get("canvas") or {}), **part.size}

    def _runs(
        self, batch: TokenBatch, inside_S: Tensor, steps: int | None, scale: float | Mapping[str, float] | None
    ) -> list[_Run]:
        """Gather the unknown positions of each tokenizer: a row for each document that has any."""
        runs = []
        unknown_P = ~batch.known_BL.flatten()
        tokenizer_P = batch.tokenizer_S[batch.segment_BL.clamp_min(0)].flatten()
        document_P, span_P = batch.document_BL.flatten(), batch.span_BL.flatten()
        segment_P = batch.segment_BL.flatten()
        # Place within the segment: tokens of a segment follow one another.
        flat_P = torch.arange(len(segment_P), device=segment_P.device)
        first_S = torch.full_like(batch.document_S, len(flat_P))
        first_S = first_S.scatter_reduce(0, segment_P.clamp_min(0), flat_P.where(segment_P >= 0, len(flat_P)), "amin")
        inside_P = (flat_P - first_S[segment_P.clamp_min(0)]) < inside_S[segment_P.clamp_min(0)]
        for place, (name, spans) in enumerate(self.vocabulary.spans.items()):
            flat_U = torch.nonzero(unknown_P & (tokenizer_P == place)).flatten()
            if not len(flat_U):
                continue
            sampler = self.samplers[name]
            size = max(stop - start for start, stop in spans)
            rows, row_U, count_R = torch.unique(document_P[flat_U], return_inverse=True, return_counts=True)
            order_U = torch.argsort(row_U, stable=True)
            column_U = torch.arange(len(flat_U), device=flat_U.device) - (count_R.cumsum(0) - count_R)[row_U[order_U]]
            shape = (len(rows), int(count_R.max()))
            index = (row_U[order_U], column_U)
            place_RN = torch.zeros(shape, dtype=torch.int64, device=flat_U.device)
            place_RN[index] = flat_U[order_U]
            sample_RN = torch.full_like(place_RN, -1)
            sample_RN[index] = size
            levels_RN = (span_P[place_RN] - self.vocabulary.first_span[name]).where(sample_RN >= 0, 0)
            coords_RN3 = batch.coords_BL3.flatten(0, 1)[place_RN]
            stop_RN = None
            if self.vocabulary.tokenizers[name].variable_length:
                stop_RN = self.vocabulary.stop_codes(name, levels_RN)
            adaptive = sampler.config["count"] in ADAPTIVE
            state = sampler.start(sample_RN, levels_RN, coords_RN3, None if adaptive else steps, stop_RN)
            strength = sampler.config["guidance_scale"] if scale is None else scale
            scales = strength if isinstance(strength, Mapping) else {"": strength}
            inside_RN = inside_P[place_RN] & (sample_RN >= 0) & self.vocabulary.tokenizers[name].variable_length
            fresh_R = torch.ones(len(rows), dtype=torch.bool, device=flat_U.device)
            runs.append(_Run(name, sampler, scales, rows.tolist(), place_RN, inside_RN, sample_RN, state, fresh_R))
        if steps is not None:
            scheduled = [run for run in runs if run.sampler.config["count"] not in ADAPTIVE]
            if not scheduled:
                counts = ", ".join(f"{run.name}: {run.sampler.config['count']}" for run in runs)
                raise ValueError(f"num_inference_steps {steps}, but count finds the number itself ({counts})")
            most = max(run.sample_RN.shape[1] for run in scheduled)
            if steps > most and all(run.sampler.config["count"] != "ancestral" for run in scheduled):
                raise ValueError(f"num_inference_steps {steps} is more than the {most} codes to fill in")
        return runs

    def _null(self, key: str, batch: TokenBatch, segments: Sequence[Sequence[Segment]], required: bool) -> Tensor:
        """null_BL: the tokens of given segments, of one tokenizer or of all (""), which a null does not see."""
        if key:
            self.vocabulary.layout(key)
        given = [
            [bool(segment.known_N.all()) and key in ("", segment.tokenizer) for segment in document]
            for document in segments
        ]
        if required and not all(map(any, given)):
            number = next(number for number, row in enumerate(given) if not any(row))
            raise ValueError(
                f"guidance_scale other than 1 needs a condition, but document {number} has no given "
                f"{f'{key!r} ' if key else ''}segment; set guidance_scale=1"
            )
        flat = [known for row in given for known in row]
        given_S = torch.tensor(flat, device=batch.ids_BL.device)
        return given_S[batch.segment_BL.clamp_min(0)] & (batch.segment_BL >= 0)

    def _step(
        self,
        step: int,
        runs: list[_Run],
        ids_P: Tensor,
        nulls: Mapping[str, Tensor],
        batch: TokenBatch,
        generators: list[torch.Generator],
        nfe: list[int],
        last: _Logits | None,
    ) -> _Logits:
        """One forward pass for all tokenizers and nulls; updates the runs, `ids_P` and `nfe` in place.

        Logits of the step before are read again where nothing has changed since.
        """
        active = [(run, run.sampler.needs(run.state)) for run in runs if not run.done(step)]
        scales = {run.name: run.scales_at(step) for run, _ in active}
        keys = tuple(sorted({key for run, where_RN in active if bool(where_RN.any()) for key in scales[run.name]}))
        where = {run.name: where_RN for run, where_RN in active}
        logits = last
        if not any(bool(where_RN.any()) for where_RN in where.values()):
            sizes = {run.name: run.state.mask_token_id for run, _ in active}
            nothing = {name: [torch.empty(0, size, device=ids_P.device)] for name, size in sizes.items()}
            logits = _Logits((), where, nothing)
        elif last is None or not last.holds(keys, where) or any(bool(run.fresh_R.any()) for run in runs):
            places = {run.name: run.place_RN[where_RN] for run, where_RN in active}
            levels = {run.name: run.state.levels_RN[where_RN] for run, where_RN in active}
            ids_BL = ids_P.view_as(batch.ids_BL)
            seen = [ids_BL, *(torch.where(nulls[key], MASK, ids_BL) for key in keys)]
            logits = _Logits(keys, where, self._logits(seen, batch, places, levels))
            if last is None or keys != last.keys:
                for run in runs:
                    run.fresh_R = torch.ones_like(run.fresh_R)
            self._count(active, scales, nulls, batch, nfe)
            for run in runs:
                run.fresh_R = torch.zeros_like(run.fresh_R)
        assert logits is not None
        for run, where_RN in active:
            conditional, *unconditional = logits.values[run.name]
            null_of = dict(zip(keys, unconditional, strict=True))
            logits_MV = guide(
                conditional, [(null_of[key], scale) for key, scale in scales[run.name].items() if key in null_of]
            )
            inside = torch.nonzero(run.inside_RN[where_RN]).flatten()
            if len(inside):
                stops = self.vocabulary.stop_codes(run.name, run.state.levels_RN[where_RN][inside])
                logits_MV = logits_MV.index_put((inside, stops), logits_MV.new_tensor(-torch.inf))
            output = run.sampler.step(
                logits_MV,
                run.state.steps - 1 - step,
                run.sample_RN,
                where=where_RN,
                state=run.state,
                generator=[generators[document] for document in run.documents],
            )
            run.fresh_R = (output.prev_sample != run.sample_RN).any(1)
            run.sample_RN, run.state = output.prev_sample, output.state
            there_RN = run.sample_RN >= 0
            masked_RN = run.sample_RN == run.state.mask_token_id
            shared_RN = self.vocabulary.to_shared(
                run.name, run.sample_RN.where(there_RN & ~masked_RN, 0), run.state.levels_RN
            )
            ids_P[run.place_RN[there_RN]] = shared_RN.masked_fill(masked_RN, MASK)[there_RN]
        return logits

    def _count(
        self,
        active: Sequence[tuple[_Run, Tensor]],
        scales: Mapping[str, Mapping[str, float]],
        nulls: Mapping[str, Tensor],
        batch: TokenBatch,
        nfe: list[int],
    ) -> None:
        """Add a step's forward passes, as if each document were alone: those of others cost it nothing."""
        guided = {key: set(batch.document_BL[null_BL].tolist()) for key, null_BL in nulls.items()}
        fresh = {
            document
            for run, _ in active
            for document, changed in zip(run.documents, run.fresh_R.tolist(), strict=True)
            if changed
        }
        passes: dict[int, set[str]] = {}
        for run, where_RN in active:
            for document, asked in zip(run.documents, where_RN.any(1).tolist(), strict=True):
                if asked and document in fresh:
                    keys = {key for key in scales[run.name] if document in guided[key]}
                    passes[document] = passes.get(document, set()) | keys
        for document, keys in passes.items():
            nfe[document] += 1 + len(keys)

    def _logits(
        self,
        seen: Sequence[Tensor],
        batch: TokenBatch,
        places: Mapping[str, Tensor],
        levels: Mapping[str, Tensor],
    ) -> dict[str, list[Tensor]]:
        """Local log-probabilities for each tokenizer asked, a logits_MV for each of the ids_BL that are `seen`, all in
        one forward pass; -inf beyond a level's span."""
        ids_BL = torch.cat(list(seen))
        offset_U = torch.arange(len(seen), device=ids_BL.device) * batch.ids_BL.numel()
        nowhere = torch.empty(0, dtype=torch.int64, device=ids_BL.device)
        queries, rows = [], []
        for name, level, span in self.vocabulary.flat_spans:
            row_N = torch.nonzero(levels[name] == level).flatten() if name in places else nowhere
            place_N = places[name][row_N] if name in places else nowhere
            queries.append(((offset_U[:, None] + place_N).flatten(), span))
            rows.append(row_N)
        repeated = [
            tensor.repeat(len(seen), *[1] * (tensor.dim() - 1))
            for tensor in (batch.positions_BL3, batch.document_BL, batch.coords_BL3)
        ]
        logits = self.transformer(ids_BL, repeated[0], repeated[1], queries, repeated[2])
        gathered: dict[str, list[Tensor]] = {}
        exact = torch.float64 if self.transformer.dtype == torch.float64 else torch.float32
        for (name, _, (start, stop)), row_N, logits_NV in zip(self.vocabulary.flat_spans, rows, logits, strict=True):
            if name in places:
                size = max(b - a for a, b in self.vocabulary.spans[name])
                if name not in gathered:
                    shape = (len(places[name]), size)
                    gathered[name] = [logits_NV.new_full(shape, -torch.inf, dtype=exact) for _ in seen]
                for whole_MV, part_NV in zip(
                    gathered[name], logits_NV.view(len(seen), len(row_N), stop - start), strict=True
                ):
                    whole_MV[row_N, : stop - start] = torch.log_softmax(part_NV.to(exact), -1)
        return gathered

    def _current(self, batch: TokenBatch, segments: Sequence[Sequence[Segment]], ids_P: Tensor) -> list[list[Segment]]:
        """The documents as they stand; undecided positions hold local id 0 and are not known."""
        parts = _by_segment(ids_P, batch)
        current, number = [], 0
        for document in segments:
            row = []
            for segment in document:
                shared_N = parts[number]
                decided_N = shared_N != MASK
                first_N = self.vocabulary.to_shared(
                    segment.tokenizer, torch.zeros_like(segment.levels_N), segment.levels_N
                )
                ids_N = self.vocabulary.to_local(
                    segment.tokenizer, torch.where(decided_N, shared_N, first_N), segment.levels_N
                )
                row.append(replace(segment, ids_N=ids_N, known_N=decided_N))
                number += 1
            current.append(row)
        return current

    def _decode(
        self,
        documents: Sequence[Sequence[Given | Blank | Partial]],
        filled: Sequence[Sequence[Segment]],
        p: Sequence[Tensor],
    ) -> list[list[Filled]]:
        codes = [[self.sequencer.codes(segment) for segment in document] for document in filled]
        made = [
            (row, column)
            for row, document in enumerate(documents)
            for column, part in enumerate(document)
            if not isinstance(part, Given)
        ]
        items: dict[tuple[int, int], Any] = {}
        for name, tokenizer in self.tokenizers.items():
            places = [(row, column) for row, column in made if documents[row][column].tokenizer == name]
            decoded = tokenizer.decode([codes[row][column] for row, column in places]) if places else []
            items |= dict(zip(places, decoded, strict=True))
        parts, p_of = [], iter(p)
        for row, document in enumerate(documents):
            parts.append([])
            for column, part in enumerate(document):
                item = part.item if isinstance(part, Given) else items[row, column]
                code = codes[row][column]
                parts[-1].append(Filled(part.tokenizer, item, code, next(p_of)[: len(code)]))
        return parts

    def save_pretrained(
        self,
        save_directory: str | Path,
        max_shard_size: int | str = "10GB",
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> None:
        """Write the model as one folder: `model_index.json`, `transformer/`, `vocabulary.json`, `tokenizers/<name>/`,
        `samplers.json` and a card. It appears whole or not at all. `push_to_hub(repo_id)` uploads such a folder.

        Args:
            save_directory: the folder; an earlier model there is replaced.
            max_shard_size: of the transformer's safetensors files.
            safe_serialization, variant: diffusers' arguments; only plain safetensors are written.
        """
        if not safe_serialization or variant is not None:
            raise ValueError("multidiff writes plain safetensors only: leave safe_serialization and variant alone")
        saving.save(self, Path(save_directory), max_shard_size)

    def _upload_folder(self, working_dir: Any, repo_id: str, *arguments: Any, **options: Any) -> Any:
        # diffusers' push_to_hub puts an empty card over ours.
        saving.write_card(self, Path(working_dir))
        return super()._upload_folder(working_dir, repo_id, *arguments, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *, device: str = "cpu") -> Self:
        """A pipeline from a saved folder or a Lightning checkpoint (`.ckpt`; its averaged weights where it has them).

        Runs no code from either.

        Raises:
            ValueError: a file is missing, truncated, foreign or does not fit the others; the message names it.
        """
        path = Path(pretrained_model_name_or_path)
        parts = saving.load_checkpoint(path) if path.is_file() else saving.load_folder(path)
        return cls(*parts).to(device)


def _by_segment(values_P: Tensor, batch: TokenBatch) -> list[Tensor]:
    """Values of the tokens of each segment, on the CPU. Rows keep the order of documents, so the tokens of all segments
    follow one another."""
    segment_P = batch.segment_BL.flatten().cpu()
    numbers = torch.bincount(segment_P[segment_P >= 0], minlength=len(batch.document_S))
    return list(values_P.cpu()[segment_P >= 0].split(numbers.tolist()))


def _generators(generator: torch.Generator | Sequence[torch.Generator] | None, documents: int) -> list[torch.Generator]:
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if isinstance(generator, torch.Generator):
        return [generator] * documents
    if len(generator) != documents:
        raise ValueError(f"{len(generator)} generators for {documents} documents: give one for each, or one for all")
    return list(generator)


def _record(
    step: int, runs: Sequence[_Run], before: Sequence[Tensor], batch: TokenBatch, history: list[list[Decision]]
) -> None:
    """Add what a step has changed, in the order of places."""
    segment_P = batch.segment_BL.flatten()
    first_segment = torch.bincount(batch.document_S).cumsum(0) - torch.bincount(batch.document_S)
    for run, sample_RN in zip(runs, before, strict=True):
        for row, column in (run.sample_RN != sample_RN).nonzero().tolist():
            flat = int(run.place_RN[row, column])
            segment = int(segment_P[flat])
            place = flat - int((segment_P == segment).nonzero()[0])
            token = int(run.sample_RN[row, column])
            token = -1 if token == run.state.mask_token_id else token
            document = run.documents[row]
            number = segment - int(first_segment[document])
            history[document].append(Decision(step, number, place, token, float(run.state.p_RN[row, column])))
