"""Documents that are longer than a model should take: refused, left out, cut or split, when shards are read.

The length of a document is what it has in tokens: `<bos>`, two structure tokens a segment, and its codes. EOS padding
comes on top.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info

from multidiff.data.tokenized import warn_of_share
from multidiff.tokenizer import ModalityTokenizer

LongDocuments = Literal["raise", "skip", "crop", "split"]


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


@dataclass
class Selection:
    """The documents of a split, as rows of its shards.

    Attributes:
        rows: the row of each document.
        parts: the part of each segment, by document; a document that is not listed is its whole row.
    """

    rows: Sequence[int]
    parts: dict[int, list[Part]] = field(default_factory=dict)


def select(
    rows: Dataset,
    split: str,
    tokenizers: Mapping[str, ModalityTokenizer],
    most: int | None,
    long_documents: LongDocuments,
    metadata: Path,
) -> Selection:
    """The documents of a split, none longer than `most` tokens. The same arguments always select the same documents.

    Args:
        rows: the shards of the split (`multidiff.data.tokenized.open_split`).
        split: its name, for messages.
        tokenizers: by name; they say which segments vary in length.
        most: tokens; None lets every document through.
        long_documents: what happens to longer ones, see `multidiff.data.DocumentDataModule`.
        metadata: the file that lists the documents, for messages.

    Raises:
        ValueError: a longer document under "raise", or one that cannot be cropped or split, naming file and line; all
            documents are longer under "skip".
    """
    columns = rows.select_columns(["length", "line"]).with_format("numpy")[:]
    lengths = columns["length"]
    if most is None or lengths.max() <= most:
        return Selection(range(len(rows)))
    lines = columns["line"][lengths > most].tolist()
    shown = f"{', '.join(map(str, lines[:10]))}{f' and {len(lines) - 10} more' if len(lines) > 10 else ''}"
    if long_documents == "skip" and len(lines) == len(rows):
        raise ValueError(
            f"{metadata}: all {len(rows)} documents of split {split!r} are longer than max_seq_length {most:,} "
            f"(lines {shown}). Raise max_seq_length or set long_documents to crop or split."
        )
    documents: list[int] = []
    parts: dict[int, list[Part]] = {}
    for number, length in enumerate(lengths.tolist()):
        if length <= most:
            documents.append(number)
        elif long_documents != "skip":
            try:
                fitting = _fit(rows[number], tokenizers, most, long_documents)
            except ValueError as error:
                raise ValueError(
                    f"{metadata}, line {rows[number]['line']}: the document has {length:,} tokens, more than "
                    f"max_seq_length {most:,}. {error}"
                ) from None
            for piece in fitting:
                parts[len(documents)] = piece
                documents.append(number)
    done = {"skip": "left out", "crop": "cropped", "split": "split"}[long_documents]
    rank_zero_info(
        f"Documents longer than max_seq_length {most:,} are {done}: {len(lines)} of {len(rows)} in split {split!r}"
        f", {metadata}, lines {shown}."
    )
    if long_documents == "skip":
        warn_of_share(split, len(lines), len(rows), f"they are longer than max_seq_length {most:,}")
    return Selection(documents, parts)


def _fit(
    row: Mapping[str, Any], tokenizers: Mapping[str, ModalityTokenizer], most: int, long_documents: LongDocuments
) -> list[list[Part]]:
    """The documents that a row becomes, as parts of its segments. Raises `ValueError` with advice if it cannot."""
    if long_documents == "raise":
        raise ValueError("Shorten it, raise max_seq_length, or set long_documents to crop, split or skip.")
    counts = [len(ids) for ids in row["ids"]]
    parts = [Part(0, count, size, True) for count, size in zip(counts, row["sizes"], strict=True)]
    varying = [index for index, name in enumerate(row["names"]) if tokenizers[name].variable_length and counts[index]]
    room = most - (row["length"] - sum(counts[index] for index in varying))
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
