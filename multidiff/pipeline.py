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
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from multidiff import saving
from multidiff.samplers import MaskSampler, State
from multidiff.samplers.guidance import guide
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

    Args:
        codes: as `tokenizer.encode` returns them; arbitrary valid ids where unknown.
        known_N: bool, one for each code.
    """

    def __init__(self, tokenizer: str, codes: Codes, known_N: Tensor):
        self.tokenizer = tokenizer
        self.codes = codes
        self.known_N = known_N


@dataclass(frozen=True)
class Filled:
    """A segment of a filled document.

    Attributes:
        tokenizer: its name.
        item: what its codes decode to; for a `Given`, what was given.
        codes: its codes.
    """

    tokenizer: str
    item: Any
    codes: Codes


@dataclass
class MultiDiffOutput(BaseOutput):
    """What the pipeline returns.

    Attributes:
        documents: the documents, filled in.
        nfe: forward passes of the denoiser that each document took; a guided step counts 2.
    """

    documents: list[list[Filled]]
    nfe: list[int]


@dataclass
class _Run:
    """One tokenizer's blanks during sampling."""

    name: str
    sampler: MaskSampler
    steps: int
    scale: float
    documents: list[int]  # of each row
    place_RN: Tensor  # flat position in B·L; 0 at padding
    inside_RN: Tensor  # of a `Partial` of varying length, whose end is known: a stop cannot be drawn
    sample_RN: Tensor
    state: State


class MultiDiffPipeline(DiffusionPipeline):
    """Fills in documents.

    Args:
        transformer: the denoiser.
        vocabulary: the layout that it was trained with.
        tokenizers: live tokenizers by name, matching the vocabulary.
        samplers: a sampler for each tokenizer; a missing one gets `MaskSampler()`.
    """

    def __init__(
        self,
        transformer: MaskedDiffusionTransformer,
        vocabulary: SharedVocabulary,
        tokenizers: Mapping[str, ModalityTokenizer],
        samplers: Mapping[str, MaskSampler] | None = None,
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
        self.samplers = {name: (samplers or {}).get(name) or MaskSampler() for name in vocabulary.tokenizers}
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
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback_on_step_end: Callable[[MultiDiffPipeline, int, int, dict[str, Any]], Any] | None = None,
    ) -> MultiDiffOutput:
        """Fill in the blanks of a batch of documents.

        Args:
            documents: lists of `Given`, `Blank` and `Partial` segments, at least one of them with something unknown.
            num_inference_steps: steps for every tokenizer; None takes each sampler's own.
            guidance_scale: classifier-free guidance for every tokenizer, 1 is none; None takes each sampler's own.
                The null is the document with its given segments masked. A document without any is not guided by a
                saved scale, and refused with one that is asked for here.
            generator: one per document, for samples that do not depend on the batch; or one for all; None draws a
                fresh seed. torch's global generator is never touched.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"documents": …})` after every step, with
                the documents as lists of `multidiff.sequence.Segment`, `known_N` True where decided.

        Raises:
            ValueError: an unknown tokenizer, a size that does not fit, nothing to fill in, guidance where a document
                gives no condition, a number of generators other than that of documents.
        """
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        generators = _generators(generator, len(documents))
        segments = self._segments(documents)
        batch = self.sequencer.batch(segments).to(self.transformer.device)
        lengths_vary = {name for name, layout in self.vocabulary.tokenizers.items() if layout.variable_length}
        inside = [isinstance(p, Partial) and p.tokenizer in lengths_vary for document in documents for p in document]
        inside_S = torch.tensor(inside, device=batch.ids_BL.device)
        runs = self._runs(batch, inside_S, num_inference_steps, guidance_scale)
        null_BL = None
        if any(run.scale != 1 for run in runs):
            null_BL = self._null(batch, segments, required=guidance_scale is not None)
        ids_P = torch.where(batch.known_BL, batch.ids_BL, MASK).flatten()
        nfe = [0] * len(documents)
        steps = max(run.steps for run in runs)
        with self.progress_bar(total=steps) as bar:  # pyright: ignore[reportCallIssue]
            for step in range(steps):
                self._step(step, runs, ids_P, null_BL, batch, generators, nfe)
                if callback_on_step_end is not None:
                    current = self._current(batch, segments, ids_P)
                    callback_on_step_end(self, step, steps - 1 - step, {"documents": current})
                bar.update()
        return MultiDiffOutput(self._decode(documents, self._current(batch, segments, ids_P)), nfe)

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
                    row.append(_partial(self.sequencer.given(part.tokenizer, part.codes), part))
                else:
                    raise ValueError(f"document {number}: {part!r} is no Given, Blank or Partial segment")
            if all(bool(segment.known_N.all()) for segment in row):
                raise ValueError(f"document {number} has nothing to fill in: give it a Blank or a Partial segment")
            segments.append(row)
        return segments

    def _blank_size(self, part: Blank) -> dict[str, int]:
        self.vocabulary.layout(part.tokenizer)
        return {**(self.samplers[part.tokenizer].config.get("canvas") or {}), **part.size}

    def _runs(self, batch: TokenBatch, inside_S: Tensor, steps: int | None, scale: float | None) -> list[_Run]:
        """Gather the unknown positions of each tokenizer: a row for each document that has any."""
        runs = []
        unknown_P = ~batch.known_BL.flatten()
        tokenizer_P = batch.tokenizer_S[batch.segment_BL.clamp_min(0)].flatten()
        document_P, span_P = batch.document_BL.flatten(), batch.span_BL.flatten()
        segment_P = batch.segment_BL.flatten()
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
            own = sampler.config["num_inference_steps"] if steps is None else steps
            state = sampler.start(sample_RN, levels_RN, coords_RN3, own)
            strength = sampler.config["guidance_scale"] if scale is None else scale
            inside_RN = inside_S[segment_P[place_RN]] & (sample_RN >= 0)
            runs.append(_Run(name, sampler, own, strength, rows.tolist(), place_RN, inside_RN, sample_RN, state))
        return runs

    def _null(self, batch: TokenBatch, segments: Sequence[Sequence[Segment]], required: bool) -> Tensor:
        """null_BL: the tokens of given segments, which the unconditional branch does not see."""
        given = [[bool(segment.known_N.all()) for segment in document] for document in segments]
        if required and not all(map(any, given)):
            number = next(number for number, row in enumerate(given) if not any(row))
            raise ValueError(
                f"guidance_scale other than 1 needs a condition, but document {number} has no given segment; "
                "set guidance_scale=1"
            )
        flat = [known for row in given for known in row]
        given_S = torch.tensor(flat, device=batch.ids_BL.device)
        return given_S[batch.segment_BL.clamp_min(0)] & (batch.segment_BL >= 0)

    def _step(
        self,
        step: int,
        runs: list[_Run],
        ids_P: Tensor,
        null_BL: Tensor | None,
        batch: TokenBatch,
        generators: list[torch.Generator],
        nfe: list[int],
    ) -> None:
        """One forward pass for all tokenizers; updates the runs, `ids_P` and `nfe` in place."""
        active = [(run, run.sampler.needs(run.state)) for run in runs if step < run.steps]
        active = [(run, where_RN) for run, where_RN in active if bool(where_RN.any())]
        if not active:
            return
        guided = null_BL is not None and any(run.scale != 1 for run, _ in active)
        conditioned = set(batch.document_BL[null_BL].tolist()) if guided else set()
        # As if each document were alone: another one's guidance costs it nothing.
        passes: dict[int, int] = {}
        for run, where_RN in active:
            for document, left in zip(run.documents, where_RN.any(1).tolist(), strict=True):
                if left:
                    both = run.scale != 1 and document in conditioned
                    passes[document] = max(passes.get(document, 1), 1 + both)
        for document, count in passes.items():
            nfe[document] += count
        asked = {run.name: where_RN for run, where_RN in active}
        places = {run.name: run.place_RN[where_RN] for run, where_RN in active}
        levels = {run.name: run.state.levels_RN[where_RN] for run, where_RN in active}
        ids_BL = ids_P.view_as(batch.ids_BL)
        conditional = self._logits(ids_BL, batch, places, levels)
        unconditional = (
            self._logits(torch.where(null_BL, MASK, ids_BL), batch, places, levels)
            if guided and null_BL is not None
            else conditional
        )
        for run, where_RN in active:
            logits_MV = conditional[run.name]
            if run.scale != 1:
                logits_MV = guide(logits_MV, unconditional[run.name], run.scale)
            inside = torch.nonzero(run.inside_RN[where_RN]).flatten()
            if len(inside):
                stops = self.vocabulary.stop_codes(run.name, levels[run.name][inside])
                logits_MV = logits_MV.index_put((inside, stops), logits_MV.new_tensor(-torch.inf))
            output = run.sampler.step(
                logits_MV,
                run.steps - 1 - step,
                run.sample_RN,
                where=asked[run.name],
                state=run.state,
                generator=[generators[document] for document in run.documents],
            )
            run.sample_RN, run.state = output.prev_sample, output.state
            decided_RN = (run.sample_RN >= 0) & (run.sample_RN != run.state.mask_token_id)
            shared_D = self.vocabulary.to_shared(run.name, run.sample_RN[decided_RN], run.state.levels_RN[decided_RN])
            ids_P[run.place_RN[decided_RN]] = shared_D

    def _logits(
        self, ids_BL: Tensor, batch: TokenBatch, places: Mapping[str, Tensor], levels: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Local log-probabilities, logits_MV, for each tokenizer asked; -inf beyond a level's span."""
        nowhere = torch.empty(0, dtype=torch.int64, device=ids_BL.device)
        queries, rows = [], []
        for name, level, span in self.vocabulary.flat_spans:
            row_N = torch.nonzero(levels[name] == level).flatten() if name in places else nowhere
            queries.append((places[name][row_N] if name in places else nowhere, span))
            rows.append(row_N)
        logits = self.transformer(ids_BL, batch.positions_BL3, batch.document_BL, queries, batch.coords_BL3)
        gathered: dict[str, Tensor] = {}
        exact = torch.float64 if self.transformer.dtype == torch.float64 else torch.float32
        for (name, _, (start, stop)), row_N, logits_NV in zip(self.vocabulary.flat_spans, rows, logits, strict=True):
            if name in places:
                size = max(b - a for a, b in self.vocabulary.spans[name])
                if name not in gathered:
                    gathered[name] = logits_NV.new_full((len(places[name]), size), -torch.inf, dtype=exact)
                gathered[name][row_N, : stop - start] = torch.log_softmax(logits_NV.to(exact), -1)
        return gathered

    def _current(self, batch: TokenBatch, segments: Sequence[Sequence[Segment]], ids_P: Tensor) -> list[list[Segment]]:
        """The documents as they stand; undecided positions hold local id 0 and are not known."""
        ids_P, segment_P = ids_P.cpu(), batch.segment_BL.flatten().cpu()
        current, number = [], 0
        # Rows keep the order of documents, so the tokens of all segments follow one another.
        inside_P = ids_P[segment_P >= 0]
        parts = inside_P.split(torch.bincount(segment_P[segment_P >= 0], minlength=len(batch.document_S)).tolist())
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
        self, documents: Sequence[Sequence[Given | Blank | Partial]], filled: Sequence[Sequence[Segment]]
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
        return [
            [
                Filled(part.tokenizer, part.item if isinstance(part, Given) else items[row, column], codes[row][column])
                for column, part in enumerate(document)
            ]
            for row, document in enumerate(documents)
        ]

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


def _partial(segment: Segment, part: Partial) -> Segment:
    if part.known_N.shape != part.codes.ids_N.shape or part.known_N.dtype != torch.bool:
        raise ValueError(f"Partial({part.tokenizer!r}): known_N must be bool, one for each of {len(part.codes)} codes")
    known_N = segment.known_N.clone()
    known_N[: len(part.codes)] = part.known_N
    return replace(segment, known_N=known_N)


def _generators(generator: torch.Generator | Sequence[torch.Generator] | None, documents: int) -> list[torch.Generator]:
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if isinstance(generator, torch.Generator):
        return [generator] * documents
    if len(generator) != documents:
        raise ValueError(f"{len(generator)} generators for {documents} documents: give one for each, or one for all")
    return list(generator)
