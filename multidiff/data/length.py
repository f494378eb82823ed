"""Documents that are longer than a model should take: refused, left out, cut or split, when shards are read.

The length of a document is what it has in tokens: `<bos>`, two structure tokens a segment, and its codes. EOS padding
comes on top.

Shape suffix: D documents of a shard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from multidiff.data.shards import Counts, Kind, Shard
from multidiff.data.splits import Split
from multidiff.data.tokenizing import warn_of_share
from multidiff.tokenizer import ModalityTokenizer

LongDocuments = Literal["raise", "skip", "crop", "split"]
_SHOWN = 10  # places in a message


class Part(NamedTuple):
    """What a document keeps of one segment's codes.

    Attributes:
        start, stop: the first code and the one after the last; whole units (tokens, frames).
        size: of the part, as the shards write sizes (JSON).
        ends: whether the item ends there; if not, no EOS may follow.
    """

    start: int
    stop: int
    size: str
    ends: bool


class Place(NamedTuple):
    """Where a document is: the shard, its row in it, and which of the pieces of that row it is."""

    shard: int
    row: int
    piece: int


@dataclass
class Selection:
    """The documents of a split, in the order of its shards.

    Attributes:
        starts: int64, the first document of each shard, and behind the last one.
        rows: the row of each document of a shard, where they are not simply all rows.
        most: tokens that no document exceeds; None where there is no limit.
        long_documents: what longer ones do.
        tokenizers: they say which segments vary in length.
        longest: tokens of the longest one that is left.
    """

    starts: np.ndarray
    rows: dict[int, np.ndarray]
    most: int | None
    long_documents: LongDocuments
    tokenizers: Mapping[str, ModalityTokenizer]
    longest: int

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, index: int) -> Place:
        """Where a document is."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        inside = index - int(self.starts[shard])
        if shard not in self.rows:
            return Place(shard, inside, 0)
        row = int(self.rows[shard][inside])
        return Place(shard, row, inside - int(np.searchsorted(self.rows[shard], row)))

    def parts(self, kinds: Sequence[Kind], piece: int) -> list[Part] | None:
        """What a document keeps of segments of these kinds; None where it is not too long."""
        if self.most is None or _length(kinds) <= self.most:
            return None
        return _fit(kinds, self.tokenizers, self.most, self.long_documents)[piece]


def select(
    split: Split, tokenizers: Mapping[str, ModalityTokenizer], most: int | None, long_documents: LongDocuments
) -> tuple[Selection, Counts]:
    """The documents of a split, none longer than `most` tokens, and how often their orders, sizes and labels occur. The
    same arguments always select the same documents.

    The size of an item that is cut, and does not end, says nothing of canvases and is not counted.

    Args:
        split: of a source.
        tokenizers: by name; they say which segments vary in length.
        most: tokens; None lets every document through.
        long_documents: what happens to longer ones, see `multidiff.data.DocumentDataModule`.

    Raises:
        ValueError: a longer document under "raise", or one that cannot be cropped or split, naming its place; all
            documents are longer under "skip".
    """
    counts, documents_D, rows = Counts(), [], {}
    counts.merge(split.counts)
    long, places, longest = 0, [], 0
    for number, info in enumerate(split.infos):
        documents_D.append(info.documents)
        if most is None or info.longest <= most:
            longest = max(longest, info.longest)
            continue
        shard = split.shard(number)
        found = np.flatnonzero(shard.length_D > most)
        long += len(found)
        places += [split.where(number, row) for row in found[: _SHOWN - len(places)].tolist()]
        pieces_D = np.ones(info.documents, np.int64)
        for row in found.tolist():
            pieces_D[row] = _count(counts, shard, row, tokenizers, most, long_documents, split.where(number, row))
        kept_D = shard.length_D[shard.length_D <= most]
        longest = max(longest, int(kept_D.max(initial=0)), 0 if long_documents == "skip" else most)
        documents_D[-1] = int(pieces_D.sum())
        rows[number] = np.repeat(np.arange(info.documents), pieces_D)
    total = sum(info.documents for info in split.infos)
    shown = f"{', '.join(places)}{f' and {long - _SHOWN} more' if long > _SHOWN else ''}"
    if long == total and long_documents == "skip":
        raise ValueError(
            f"{split.source}: all {total} documents of split {split.name!r} are longer than max_seq_length {most:,} "
            f"({shown}). Raise max_seq_length or set long_documents to crop or split."
        )
    if long:
        done = {"skip": "left out", "crop": "cropped", "split": "split"}[long_documents]
        rank_zero_info(
            f"Documents longer than max_seq_length {most:,} are {done}: {long} of {total} in split {split.name!r}, "
            f"{shown}."
        )
        if long_documents == "skip":
            warn_of_share(split.name, long, total, f"they are longer than max_seq_length {most:,}")
    starts = np.concatenate([[0], np.cumsum(documents_D, dtype=np.int64)])
    sizes = {name: +of_name for name, of_name in counts.sizes.items()}  # without those of which nothing is left
    counts = Counts(+counts.orders, sizes, +counts.labels, counts.left_out)
    return Selection(starts, rows, most, long_documents, tokenizers, longest), counts


def _count(
    counts: Counts,
    shard: Shard,
    row: int,
    tokenizers: Mapping[str, ModalityTokenizer],
    most: int,
    long_documents: LongDocuments,
    where: str,
) -> int:
    """How many documents a row that is too long becomes, with the counts put right."""
    kinds = shard.kinds_of(row)
    counts.add(kinds, -1)
    if long_documents == "skip":
        return 0
    try:
        pieces = _fit(kinds, tokenizers, most, long_documents)
    except ValueError as error:
        raise ValueError(
            f"{where}: the document has {_length(kinds):,} tokens, more than max_seq_length {most:,}. {error}"
        ) from None
    for parts in pieces:
        counts.add(kinds)
        for kind, part in zip(kinds, parts, strict=True):
            counts.sizes[kind.name][kind.size] -= 1
            if part.ends:
                counts.sizes[kind.name][part.size] += 1
    return len(pieces)


def _length(kinds: Sequence[Kind]) -> int:
    return 1 + sum(kind.codes + 2 for kind in kinds)


def _fit(
    kinds: Sequence[Kind], tokenizers: Mapping[str, ModalityTokenizer], most: int, long_documents: LongDocuments
) -> list[list[Part]]:
    """The documents that a row becomes, as parts of its segments. Raises `ValueError` with advice if it cannot."""
    if long_documents == "raise":
        raise ValueError("Shorten it, raise max_seq_length, or set long_documents to crop, split or skip.")
    parts = [Part(0, kind.codes, kind.size, True) for kind in kinds]
    varying = [index for index, kind in enumerate(kinds) if tokenizers[kind.name].variable_length and kind.codes]
    room = most - (_length(kinds) - sum(kinds[index].codes for index in varying))
    if long_documents == "crop":
        return [_crop(parts, varying, room)]
    if len(parts) != 1 or not varying:
        raise ValueError(
            "Only a document of one segment of varying length can be split. Raise max_seq_length or set "
            "long_documents to crop or skip."
        )
    return [[piece] for piece in _split(parts[0], room)]


def _crop(parts: list[Part], varying: Sequence[int], room: int) -> list[Part]:
    """The parts, those of varying length cut at their ends, the longest most, to at most `room` codes together."""
    parts = list(parts)
    if not varying:
        raise ValueError(_NO_ROOM)
    left = len(varying)
    # The shortest first: what it leaves of its share goes to the longer ones.
    for index in sorted(varying, key=lambda index: parts[index].stop):
        _, units, codes = _units(parts[index])
        kept = min(units, room // left // codes)
        if kept < 1:
            raise ValueError(_NO_ROOM)
        parts[index] = _cut(parts[index], 0, kept)
        room, left = room - parts[index].stop, left - 1
    return parts


def _split(part: Part, room: int) -> list[Part]:
    """A part as the fewest consecutive ones of at most `room` codes each, as equal as whole units allow."""
    _, units, codes = _units(part)
    if room < codes:
        raise ValueError(_NO_ROOM)
    pieces = -(-units // (room // codes))
    ends = [units * piece // pieces for piece in range(pieces + 1)]
    return [_cut(part, start, stop) for start, stop in pairwise(ends)]


def _cut(part: Part, start: int, stop: int) -> Part:
    """Units `start` to `stop` of a whole segment."""
    unit, units, codes = _units(part)
    return Part(start * codes, stop * codes, json.dumps({unit: stop - start}), stop == units)


def _units(part: Part) -> tuple[str, int, int]:
    """The unit of a segment of varying length, how many it has, and the codes of each."""
    ((unit, units),) = json.loads(part.size).items()
    return unit, units, part.stop // units


_NO_ROOM = (
    "Its segments of fixed length leave too little room for the others. Raise max_seq_length or set "
    "long_documents to skip."
)
