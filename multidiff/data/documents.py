"""Tokenized documents as lists of segments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from datasets import Dataset
from torch import Tensor

from multidiff.data.batches import DocumentKey
from multidiff.data.length import Selection
from multidiff.seeding import key_for, uniforms
from multidiff.sequence import Example, Segment, Sequencer
from multidiff.sequence.seen import most_units
from multidiff.tokenizer import Codes, ModalityTokenizer

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
    """The documents of a split; a `DocumentKey` asks for one as an `Example`, with EOS padding of its epoch.

    Args:
        rows, selection: of a split.
        sequencer: makes the segments.
        usual: name -> units of the usual canvas; only those of items of varying length are used.
        max_eos_padding, seed: as in `DocumentDataModule`.
        shuffled: whether the segments of a document are put in random order.
    """

    def __init__(
        self,
        rows: Dataset,
        selection: Selection,
        sequencer: Sequencer,
        usual: Mapping[str, int],
        max_eos_padding: Mapping[str, int],
        seed: int,
        shuffled: bool,
    ):
        self.rows, self.selection, self.sequencer = rows.with_format("arrow"), selection, sequencer
        self.usual, self.max_eos_padding, self.seed, self.shuffled = usual, max_eos_padding, seed, shuffled
        self._canvases: dict[tuple[str, str], Codes] = {}

    def __len__(self) -> int:
        return len(self.selection.rows)

    def __getitem__(self, key: DocumentKey) -> Example:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[DocumentKey]) -> list[Example]:
        rows = self._rows([key.index for key in keys])
        counts = [_NUMBERS * len(row) for row in rows]
        numbers = uniforms([key_for(self.seed, "document", key.epoch, key.index) for key in keys], counts)
        return [
            Example(self._document(row, drawn.tolist()), key.epoch, key.position, key.index, key.counts)
            for key, row, drawn in zip(keys, rows, numbers.split(counts), strict=True)
        ]

    def codes(self, index: int) -> list[tuple[str, Codes]]:
        """The codes of a document, with the names of their tokenizers."""
        (row,) = self._rows([index])
        return [(name, self._codes(name, ids, size)) for name, _, ids, size, _ in row]

    def _rows(self, indices: Sequence[int]) -> list[list[tuple[str, str, Tensor, str, bool]]]:
        """Name, label, ids, size and whether the item ends there, of each segment of each document."""
        table = self.rows[[self.selection.rows[index] for index in indices]]
        names, labels, sizes = (table[column].to_pylist() for column in ("names", "labels", "sizes"))
        documents = table["ids"].combine_chunks()
        segments = documents.flatten()
        values = torch.from_numpy(segments.flatten().to_numpy().astype("int64"))
        ids = iter(values.split(segments.value_lengths().to_pylist()))
        rows = []
        for index, *of_row in zip(indices, names, labels, sizes, strict=True):
            row = [(name, label, next(ids), size, True) for name, label, size in zip(*of_row, strict=True)]
            if parts := self.selection.parts.get(index):
                row = [
                    (name, label, codes[part.start : part.stop], part.size, part.ends)
                    for (name, label, codes, _, _), part in zip(row, parts, strict=True)
                ]
            rows.append(row)
        return rows

    def _codes(self, name: str, ids_N: Tensor, size: str) -> Codes:
        if (name, size) not in self._canvases:
            if len(self._canvases) == _MOST_KEPT:
                self._canvases.clear()
            self._canvases[name, size] = self.sequencer.canvas(name, json.loads(size))
        canvas = self._canvases[name, size]
        return Codes(ids_N, canvas.levels_N, canvas.coords_N3, canvas.size)

    def _document(self, row: Sequence[tuple[str, str, Tensor, str, bool]], numbers: Sequence[float]) -> list[Segment]:
        segments = []
        for place, (name, label, ids_N, size, ends) in enumerate(row):
            codes, padding = self._codes(name, ids_N, size), 0
            if ends and self.sequencer.vocabulary.tokenizers[name].variable_length:
                choice, more = numbers[2 * place : 2 * place + 2]
                padding = self._padding(name, next(iter(codes.size.values())), choice, more)
            segments.append(self.sequencer.given(name, codes, padding, label))
        if self.shuffled:
            order = numbers[2 * len(row) :]
            segments = [segments[place] for place in sorted(range(len(row)), key=order.__getitem__)]
        return segments

    def _padding(self, name: str, length: int, choice: float, more: float) -> int:
        """Units of EOS behind an item. A model that always sees them in proportion to the item takes the size of a
        canvas for the length of what belongs on it, so half of the canvases are as large as a blank of generation."""
        usual = self.usual.get(name, 0)
        most = most_units(length, usual, self.max_eos_padding.get(name))
        if name not in self.max_eos_padding and length < usual and choice < _USUAL:
            return usual - length
        return 1 + int(more * (most - length))
