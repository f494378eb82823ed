"""Segments, documents made of them, and documents as data serve them.

Shape suffix: N codes of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A run of one tokenizer's codes on its canvas.

    Attributes:
        tokenizer: the tokenizer's name.
        ids_N: int64, local ids; the EOS of a level is its codebook's size. Arbitrary where unknown.
        levels_N, coords_N3: as in `multidiff.Codes`; `coords_N3` is int64.
        known_N: bool; False where the model has to fill in.
        content: number of codes before the EOS; all of them where that is unknown.
        size: size of the canvas.
        label: what tasks call the segment; the tokenizer's name unless the data say otherwise.
    """

    tokenizer: str
    ids_N: Tensor
    levels_N: Tensor
    coords_N3: Tensor
    known_N: Tensor
    content: int
    size: dict[str, int]
    label: str

    def __len__(self) -> int:
        return self.ids_N.numel()


Document = Sequence[Segment]


class Example(NamedTuple):
    """A document of a data set. Its random numbers follow from the seed, the epoch and its number, whatever process or
    batch it is in.

    Attributes:
        document: its segments.
        epoch: completed passes over the data; -1 in evaluation.
        position: place in the order of the epoch, over all processes.
        number: of the document in its split.
        counts: False for one that is evaluated only because other processes have one more.
    """

    document: Document
    epoch: int
    position: int
    number: int
    counts: bool = True
