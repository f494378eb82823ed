"""Tokenized documents as lists of segments."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from multidiff.data.batches import DocumentKey
from multidiff.data.length import Selection
from multidiff.data.splits import Split
from multidiff.seeding import key_for, uniforms
from multidiff.sequence import Example, Segment, Sequencer
from multidiff.sequence.seen import most_units
from multidiff.tokenizer import Codes, ModalityTokenizer

_Row = list[tuple[str, str, Tensor, str, bool]]  # name, label, ids, size (JSON), whether the item ends there
_NUMBERS = 3  # of a segment: two for its padding, one for its place
_MOST_KEPT = 512  # canvases
_USUAL = 0.5  # of the canvases have the usual size, where the item fits it


def check_eos_padding(max_eos_padding: Mapping[str, int], tokenizers: Mapping[str, ModalityTokenizer]) -> None:
    """Refuse EOS padding of tokenizers that do not exist or need none, and numbers that are none.

    Raises:
        ValueError: it names the tokenizer.
    """
    if not isinstance(max_eos_padding, Mapping):
        raise ValueError(f"max_eos_padding must be a table of tokenizers and numbers, not {max_eos_padding!r}.")
    for name, units in max_eos_padding.items():
        if name not in tokenizers:
            raise ValueError(f"max_eos_padding {name}: no tokenizer has this name. There are {', '.join(tokenizers)}.")
        if not isinstance(units, int) or units < 1:
            raise ValueError(f"max_eos_padding {name}: {units} must be at least 1")
        if not tokenizers[name].variable_length:
            raise ValueError(f"max_eos_padding {name}: its length never varies, so it needs no EOS")


class Documents(torch.utils.data.Dataset):
    """The documents of a split of one or several sources; a `DocumentKey` asks for one as an `Example`, with EOS
    padding of its epoch.

    Args:
        parts: the split and the selection of each source.
        sequencer: makes the segments.
        usual: name -> units of the usual canvas; only those of items of varying length are used.
        max_eos_padding, seed: as in `DocumentDataModule`.
        shuffled: whether the segments of a document are put in random order.

    Attributes:
        offsets: the first document of each source, and behind the last one.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Split, Selection]],
        sequencer: Sequencer,
        usual: Mapping[str, int],
        max_eos_padding: Mapping[str, int],
        seed: int,
        shuffled: bool,
    ):
        self.parts, self.sequencer = parts, sequencer
        self.offsets = [0, *accumulate(len(selection) for _, selection in parts)]
        self.usual, self.max_eos_padding, self.seed, self.shuffled = usual, max_eos_padding, seed, shuffled
        self._canvases: dict[tuple[str, str], Codes] = {}

    def __len__(self) -> int:
        return self.offsets[-1]

    @property
    def longest(self) -> int:
        """Tokens of the longest document, without EOS padding."""
        return max(selection.longest for _, selection in self.parts)

    def __getitem__(self, key: DocumentKey) -> Example:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[DocumentKey]) -> list[Example]:
        rows = [self._row(key.index) for key in keys]
        return [
            Example(self._document(row, drawn), key.epoch, key.position, key.index, key.counts)
            for key, row, drawn in zip(keys, rows, self._numbers(keys, rows), strict=True)
        ]

    def tokens(self, keys: Sequence[DocumentKey]) -> list[int]:
        """How many tokens these documents have, with their EOS padding."""
        rows = [self._row(key.index) for key in keys]
        return [
            1 + sum(2 + self._length(row, place, drawn) for place in range(len(row)))
            for row, drawn in zip(rows, self._numbers(keys, rows), strict=True)
        ]

    def codes(self, index: int) -> list[tuple[str, Codes]]:
        """The codes of a document, with the names of their tokenizers."""
        return [(name, self._codes(name, ids, size)) for name, _, ids, size, _ in self._row(index)]

    def _numbers(self, keys: Sequence[DocumentKey], rows: Sequence[_Row]) -> list[list[float]]:
        """The random numbers of each document."""
        counts = [_NUMBERS * len(row) for row in rows]
        numbers = uniforms([key_for(self.seed, "document", key.epoch, key.index) for key in keys], counts)
        return [drawn.tolist() for drawn in numbers.split(counts)]

    def _row(self, index: int) -> _Row:
        number = bisect_right(self.offsets, index) - 1
        split, selection = self.parts[number]
        place = selection.place(index - self.offsets[number])
        document = split.shard(place.shard).document(place.row)
        parts = selection.parts([kind for kind, _ in document], place.piece)
        row = []
        for number, (kind, ids) in enumerate(document):
            size, ends = kind.size, True
            if parts is not None:
                start, stop, size, ends = parts[number]
                ids = ids[start:stop]
            row.append((kind.name, kind.label, torch.from_numpy(ids.astype("int64")), size, ends))
        return row

    def _codes(self, name: str, ids_N: Tensor, size: str) -> Codes:
        if (name, size) not in self._canvases:
            if len(self._canvases) == _MOST_KEPT:
                self._canvases.clear()
            self._canvases[name, size] = self.sequencer.canvas(name, json.loads(size))
        canvas = self._canvases[name, size]
        return Codes(ids_N, canvas.levels_N, canvas.coords_N3, canvas.size)

    def _document(self, row: _Row, numbers: Sequence[float]) -> list[Segment]:
        segments = []
        for place, (name, label, ids_N, size, _) in enumerate(row):
            padding = self._padding(row, place, numbers)
            segments.append(self.sequencer.given(name, self._codes(name, ids_N, size), padding, label))
        if self.shuffled:
            order = numbers[2 * len(row) :]
            segments = [segments[place] for place in sorted(range(len(row)), key=order.__getitem__)]
        return segments

    def _length(self, row: _Row, place: int, numbers: Sequence[float]) -> int:
        """How many codes a segment has with its EOS padding."""
        name, _, ids_N, size, _ = row[place]
        padding = self._padding(row, place, numbers)
        if not padding:
            return len(ids_N)
        ((unit, units),) = json.loads(size).items()
        return len(self.sequencer.canvas(name, {unit: units + padding}))

    def _padding(self, row: _Row, place: int, numbers: Sequence[float]) -> int:
        """Units of EOS behind an item. A model that always sees them in proportion to the item takes the size of a
        canvas for the length of what belongs on it, so half of the canvases are as large as a blank of generation."""
        name, _, _, size, ends = row[place]
        if not (ends and self.sequencer.vocabulary.tokenizers[name].variable_length):
            return 0
        length, usual = _units(size), self.usual.get(name, 0)
        choice, more = numbers[2 * place : 2 * place + 2]
        most = most_units(length, usual, self.max_eos_padding.get(name))
        if name not in self.max_eos_padding and length < usual and choice < _USUAL:
            return usual - length
        return 1 + int(more * (most - length))


@cache
def _units(size: str) -> int:
    """The units of a size (JSON) that varies."""
    return next(iter(json.loads(size).values()))
