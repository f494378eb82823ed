"""Documents to token sequences and back: segments, canvases, ends, packing, padding.

A document becomes

    <bos> <text> t t t stop </text> <image> i i i i </image> ...

`<bos>`, begin and end tokens are structure. Codes of a tokenizer of variable length lie on a *canvas*: the codes, then
at least one unit (token, frame) of *stops*, which are predicted like codes, so that a model learns to stop.

Positions have three axes. Structure tokens sit at (p, p, p); a segment's codes at p + 1 + their own coordinates; every
next token starts at 1 + the largest coordinate used so far, on all axes.

Shape suffixes: N codes of a segment, B rows, L row length, S segments of a batch, 3 axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral

import torch
from torch import Tensor

from multidiff.sequence.vocabulary import BOS, PAD, SharedVocabulary
from multidiff.tokenizer import Codes, ModalityTokenizer

MAX_CODES = 2**20  # of a segment: no model attends to half an hour of sound at 600 codes a second


@dataclass
class Segment:
    """A run of one tokenizer's codes on its canvas.

    Attributes:
        tokenizer: its name.
        ids_N: int64, local ids; a stop is its codebook's size. Arbitrary where unknown.
        levels_N, coords_N3: as in `Codes`.
        known_N: bool; False where the model has to fill in.
        content: number of codes before the stops; all of them where that is unknown.
        size: size of the canvas.
    """

    tokenizer: str
    ids_N: Tensor
    levels_N: Tensor
    coords_N3: Tensor
    known_N: Tensor
    content: int
    size: dict[str, int]

    def __len__(self) -> int:
        return self.ids_N.numel()


Document = Sequence[Segment]


@dataclass
class TokenBatch:
    """Documents as rows of tokens; a row may hold several.

    Attributes:
        ids_BL: int64, shared ids; `<pad>` fills up.
        positions_BL3: int64, rotary positions.
        coords_BL3: int64, coordinates within the segment; -1 at structure and padding.
        document_BL: int64, index of the document within the batch; -1 at padding.
        segment_BL: int64, index of the segment within the batch; -1 at structure and padding.
        span_BL: int64, span index in the vocabulary (`SharedVocabulary.flat_spans`); -1 at structure and padding.
        known_BL: bool, False where the model has to fill in.
        tokenizer_S: int64, place of each segment's tokenizer in the vocabulary.
        document_S: int64, document of each segment.
        divisor_S: int64, what a segment's nats are divided by: its codes, plus one where its length varies; 0 where a
            document does not count.
    """

    ids_BL: Tensor
    positions_BL3: Tensor
    coords_BL3: Tensor
    document_BL: Tensor
    segment_BL: Tensor
    span_BL: Tensor
    known_BL: Tensor
    tokenizer_S: Tensor
    document_S: Tensor
    divisor_S: Tensor

    @property
    def num_documents(self) -> int:
        return int(self.document_S[-1]) + 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        """The same batch on `device`."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        return replace(self, **moved)


class Sequencer:
    """Builds segments and batches for a set of tokenizers.

    Args:
        tokenizers: live tokenizers by name; only their canvases are used.
        vocabulary: their vocabulary.
    """

    def __init__(self, tokenizers: Mapping[str, ModalityTokenizer], vocabulary: SharedVocabulary):
        self.tokenizers = dict(tokenizers)
        self.vocabulary = vocabulary
        self._canvases: dict[tuple, Codes] = {}

    def canvas(self, name: str, size: Mapping[str, int]) -> Codes:
        """The tokenizer's canvas; kept for the next of its size, so treat it as read-only."""
        key = (name, *sorted(size.items()))
        if key not in self._canvases:
            self.vocabulary.layout(name)
            self._check_size(name, size)
            if len(self._canvases) == 256:  # long texts come in thousands of sizes
                self._canvases.clear()
            try:
                self._canvases[key] = self.tokenizers[name].canvas(**size)
            except (ValueError, TypeError) as error:
                raise ValueError(f"canvas of {name} of size {dict(size)}: {error}") from None
        return self._canvases[key]

    def _check_size(self, name: str, size: Mapping[str, int]) -> None:
        """Refuse keys and values that are no size, and a size too large to allocate.

        The default canvas has all keys, and codes in proportion to its size.
        """
        if not size:
            return
        default = self.canvas(name, {})
        for key, number in size.items():
            if key not in default.size:
                raise ValueError(
                    f"canvas of {name} of size {dict(size)}: {key} is not part of its size, which has "
                    f"{', '.join(default.size)}"
                )
            if not isinstance(number, Integral) or isinstance(number, bool) or number < 0:
                raise ValueError(
                    f"canvas of {name} of size {dict(size)}: {key} must be a whole number of at least 0, got {number!r}"
                )
        sizes = {**default.size, **size}
        codes = max(1, len(default)) * math.prod(sizes.values()) // max(1, math.prod(default.size.values()))
        if codes > MAX_CODES:
            raise ValueError(
                f"canvas of {name} of size {dict(size)}: it has {codes:,} codes, more than the {MAX_CODES:,} that a "
                "segment may have; make it smaller"
            )

    def given(self, name: str, codes: Codes, max_eos_padding: int = 1) -> Segment:
        """A known segment; `max_eos_padding` ≥ 1 units of stops follow its codes where its length varies."""
        self.vocabulary.layout(name)
        if not self.vocabulary.tokenizers[name].variable_length:
            known_N = torch.ones(len(codes), dtype=torch.bool)
            return Segment(name, codes.ids_N, codes.levels_N, codes.coords_N3, known_N, len(codes), codes.size)
        (unit, length), *_ = codes.size.items()
        canvas = self.canvas(name, {unit: length + max_eos_padding})
        eos_N = self.vocabulary.eos_ids(name, canvas.levels_N[len(codes) :])
        ids_N = torch.cat([codes.ids_N, eos_N])
        known_N = torch.ones(len(ids_N), dtype=torch.bool)
        return Segment(name, ids_N, canvas.levels_N, canvas.coords_N3, known_N, len(codes), canvas.size)

    def blank(self, name: str, size: Mapping[str, int]) -> Segment:
        """A segment to be filled in; on it, a stop ends content of varying length."""
        canvas = self.canvas(name, size)
        if not len(canvas):
            raise ValueError(f"a blank {name} of size {canvas.size} has no room; make it larger")
        known_N = torch.zeros(len(canvas), dtype=torch.bool)
        return Segment(name, canvas.ids_N.clone(), canvas.levels_N, canvas.coords_N3, known_N, len(canvas), canvas.size)

    def unit(self, segment: Segment) -> int:
        """How many codes a unit of the segment's length has (a token 1, a frame one of each level); 1 where it is
        fixed."""
        varies = self.vocabulary.tokenizers[segment.tokenizer].variable_length
        length = next(iter(segment.size.values())) if varies else 0
        return len(segment) // length if length else 1

    def codes(self, segment: Segment) -> Codes:
        """What a segment holds, stops removed.

        Content ends at the first unit whose level 0 is a stop. In what a pipeline makes, the codes of a unit are all
        stops or none is. In codes from elsewhere a stop of a higher level before the end says nothing and has no sound
        of its own: it becomes code 0.
        """
        ids_N, levels_N, coords_N3, size = segment.ids_N, segment.levels_N, segment.coords_N3, segment.size
        if not self.vocabulary.tokenizers[segment.tokenizer].variable_length:
            return Codes(ids_N, levels_N, coords_N3, dict(size))
        (unit, length), *_ = size.items()
        eos_N = ids_N == self.vocabulary.eos_ids(segment.tokenizer, levels_N)
        ends = torch.nonzero(eos_N & (levels_N == 0)).flatten()
        units = int(ends[0]) // self.unit(segment) if len(ends) else length
        end = units * self.unit(segment)
        ids_N = torch.where(eos_N[:end], 0, ids_N[:end])
        return Codes(ids_N, levels_N[:end], coords_N3[:end], {unit: units})

    def batch(self, documents: Sequence[Document], row_length: int | None = None) -> TokenBatch:
        """Documents to one batch.

        Args:
            documents: at least one, each with at least one segment.
            row_length: pack several documents into rows of this many tokens (longer documents make longer rows);
                None gives each document a row of its own, in order.
        """
        pieces = [self._tokens(document) for document in documents]
        lengths = [len(piece[0]) for piece in pieces]
        rows = _first_fit(lengths, row_length) if row_length else [[index] for index in range(len(pieces))]
        width = max(sum(lengths[index] for index in row) for row in rows)
        shape = (len(rows), width)
        ids_BL = torch.full(shape, PAD)
        positions_BL3 = torch.zeros(*shape, 3, dtype=torch.int64)
        coords_BL3 = torch.full((*shape, 3), -1)
        document_BL = torch.full(shape, -1)
        segment_BL = torch.full(shape, -1)
        span_BL = torch.full(shape, -1)
        known_BL = torch.ones(shape, dtype=torch.bool)
        first_segment = [0]
        for document in documents:
            first_segment.append(first_segment[-1] + len(document))
        for row, members in enumerate(rows):
            start = 0
            for index in members:
                ids_L, positions_L3, coords_L3, segment_L, span_L, known_L = pieces[index]
                place = slice(start, start + lengths[index])
                ids_BL[row, place] = ids_L
                positions_BL3[row, place] = positions_L3
                coords_BL3[row, place] = coords_L3
                document_BL[row, place] = index
                segment_BL[row, place] = torch.where(segment_L < 0, -1, segment_L + first_segment[index])
                span_BL[row, place] = span_L
                known_BL[row, place] = known_L
                start += lengths[index]
        order = {name: place for place, name in enumerate(self.vocabulary.tokenizers)}
        segments = [(index, segment) for index, document in enumerate(documents) for segment in document]
        layouts = self.vocabulary.tokenizers
        return TokenBatch(
            ids_BL,
            positions_BL3,
            coords_BL3,
            document_BL,
            segment_BL,
            span_BL,
            known_BL,
            tokenizer_S=torch.tensor([order[segment.tokenizer] for _, segment in segments]),
            document_S=torch.tensor([index for index, _ in segments]),
            divisor_S=torch.tensor([s.content + layouts[s.tokenizer].variable_length for _, s in segments]),
        )

    def _tokens(self, document: Document) -> tuple[Tensor, ...]:
        """ids_L, positions_L3, coords_L3, segment_L (from 0 within the document), span_L, known_L of one document."""
        if not document:
            raise ValueError("a document needs at least one segment")
        vocabulary = self.vocabulary
        structure, nowhere_13, true = torch.tensor([-1]), torch.full((1, 3), -1), torch.tensor([True])
        ids, positions, coords = [torch.tensor([BOS])], [torch.zeros(1, 3, dtype=torch.int64)], [nowhere_13]
        segments, spans, known = [structure], [structure], [true]
        cursor = 1
        for index, segment in enumerate(document):
            name = segment.tokenizer
            ids += [
                torch.tensor([vocabulary.begin_ids[name]]),
                vocabulary.to_shared(name, segment.ids_N, segment.levels_N),
                torch.tensor([vocabulary.end_ids[name]]),
            ]
            inside_N3 = segment.coords_N3 + cursor + 1
            last = int(inside_N3.max()) + 1 if len(segment) else cursor + 1
            positions += [torch.full((1, 3), cursor), inside_N3, torch.full((1, 3), last)]
            coords += [nowhere_13, segment.coords_N3, nowhere_13]
            cursor = last + 1
            segments += [structure, torch.full((len(segment),), index), structure]
            spans += [structure, vocabulary.first_span[name] + segment.levels_N, structure]
            known += [true, segment.known_N, true]
        return tuple(torch.cat(parts) for parts in (ids, positions, coords, segments, spans, known))


def _first_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Documents to rows, longest first, each into the first row that has room."""
    row_length = max(row_length, *lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row, free in enumerate(room):
            if lengths[index] <= free:
                rows[row].append(index)
                room[row] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(row_length - lengths[index])
    return rows
