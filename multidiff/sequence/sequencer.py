"""The sequencer: codes to segments on their canvases and back, and documents to token batches.

Codes of a tokenizer of varying length lie on a *canvas*: the codes, then at least one unit (token, frame) of EOS. The
first EOS is predicted like a code, so that a model learns where content ends. Those after it are padding EOS.

Shape suffixes: N codes of a segment, T = N + 2 its tokens, 3 axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral

import torch

from multidiff.sequence.batch import Layout, TokenBatch, lay_out
from multidiff.sequence.segments import Document, Segment
from multidiff.sequence.vocabulary import SharedVocabulary
from multidiff.tokenizer import Codes, ModalityTokenizer

MAX_CODES = 2**20  # of a segment: no model attends to half an hour of sound at 600 codes a second
_MOST_KEPT = 512  # long texts come in thousands of sizes


class Sequencer:
    """Builds segments and batches for a set of tokenizers.

    Args:
        tokenizers: live tokenizers by name; only their canvases are used.
        vocabulary: their vocabulary.
    """

    def __init__(self, tokenizers: Mapping[str, ModalityTokenizer], vocabulary: SharedVocabulary):
        self.tokenizers = dict(tokenizers)
        self.vocabulary = vocabulary
        self._places = {name: place for place, name in enumerate(vocabulary.tokenizers)}
        self._canvases: dict[tuple, Codes] = {}
        self._layouts: dict[tuple, Layout] = {}
        self._rooms: dict[tuple[str, int], tuple[Codes, torch.Tensor]] = {}
        self._known_N = torch.ones(0, dtype=torch.bool)

    def canvas(self, name: str, size: Mapping[str, int]) -> Codes:
        """The tokenizer's canvas; kept for the next of its size, so treat it as read-only."""
        key = (name, *((unit, type(number), number) for unit, number in sorted(size.items())))
        if key not in self._canvases:
            self.vocabulary.layout(name)
            self._check_size(name, size)
            if len(self._canvases) == _MOST_KEPT:
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

    def given(self, name: str, codes: Codes, padding: int = 1, label: str | None = None) -> Segment:
        """A known segment.

        Args:
            name: of the tokenizer.
            codes: valid ones of that tokenizer.
            padding: where its length varies, units of EOS after the codes; 0 where the item goes on.
            label: what tasks call it; None is the tokenizer's name.
        """
        ids_N, levels_N, coords_N3, size = codes.ids_N, codes.levels_N, codes.coords_N3, codes.size
        content = length = ids_N.numel()
        if padding and self.vocabulary.layout(name).variable_length:
            ((unit, units),) = size.items()
            key = (name, units + padding)
            if key not in self._rooms:
                if len(self._rooms) == _MOST_KEPT:
                    self._rooms.clear()
                canvas = self.canvas(name, {unit: units + padding})
                self._rooms[key] = canvas, self.vocabulary.eos_ids(name, canvas.levels_N)
            canvas, eos_N = self._rooms[key]
            levels_N, coords_N3, size = canvas.levels_N, canvas.coords_N3, canvas.size
            ids_N, length = torch.cat([ids_N, eos_N[content:]]), eos_N.numel()
        if self._known_N.numel() < length:
            self._known_N = torch.ones(length, dtype=torch.bool)
        known_N = self._known_N[:length]
        return Segment(name, ids_N, levels_N, coords_N3, known_N, content, size, name if label is None else label)

    def blank(self, name: str, size: Mapping[str, int]) -> Segment:
        """A segment to be filled in. Where its length varies, an EOS on it ends the content."""
        canvas = self.canvas(name, size)
        if not len(canvas):
            raise ValueError(f"A blank {name} of size {canvas.size} has no room. Make it larger.")
        known_N = torch.zeros(len(canvas), dtype=torch.bool)
        return Segment(name, canvas.ids_N, canvas.levels_N, canvas.coords_N3, known_N, len(canvas), canvas.size, name)

    def unit(self, segment: Segment) -> int:
        """How many codes a unit of the segment's length has (a token 1, a frame one of each level); 1 where it is
        fixed."""
        varies = self.vocabulary.tokenizers[segment.tokenizer].variable_length
        length = next(iter(segment.size.values())) if varies else 0
        return len(segment) // length if length else 1

    def codes(self, segment: Segment) -> Codes:
        """What a segment holds, EOS removed.

        Content ends at the first unit whose level 0 is an EOS. In what a pipeline makes, the codes of a unit are all
        EOS or none is. In codes from elsewhere an EOS of a higher level before the end says nothing and has no sound
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

    def batch(self, documents: Sequence[Document]) -> TokenBatch:
        """Documents, of at least one segment each, as one batch in their order."""
        return lay_out(documents, [[self._layout(segment) for segment in document] for document in documents])

    def _layout(self, segment: Segment) -> Layout:
        key = (segment.tokenizer, len(segment), *segment.size.items())
        if key not in self._layouts:
            if len(self._layouts) == _MOST_KEPT:
                self._layouts.clear()
            self._layouts[key] = self._make_layout(segment)
        return self._layouts[key]

    def _make_layout(self, segment: Segment) -> Layout:
        name, vocabulary = segment.tokenizer, self.vocabulary
        begin, end, nowhere = vocabulary.begin_ids[name], vocabulary.end_ids[name], torch.full((1, 3), -1)
        starts_L = torch.tensor([start for start, _ in vocabulary.spans[name]])
        extent = int(segment.coords_N3.max()) + 2 if len(segment) else 1
        zero_13, structure_1 = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([-1])
        return Layout(
            offset_T=torch.cat([torch.tensor([begin]), starts_L[segment.levels_N], torch.tensor([end])]).numpy(),
            positions_T3=torch.cat([zero_13, segment.coords_N3 + 1, zero_13 + extent]).numpy(),
            coords_T3=torch.cat([nowhere, segment.coords_N3, nowhere]).numpy(),
            span_T=torch.cat([structure_1, vocabulary.first_span[name] + segment.levels_N, structure_1]).numpy(),
            tokens=len(segment) + 2,
            extent=extent,
            place=self._places[name],
            varies=vocabulary.tokenizers[name].variable_length,
        )
