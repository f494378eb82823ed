"""What a source of documents must offer, wherever the documents are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from multidiff.tokenizer import ModalityTokenizer

SPLITS: tuple[str, ...] = ("train", "validation", "test")


class Record(NamedTuple):
    """A document as it is written down, with its items unread.

    Attributes:
        line: number of the line or row in its part, from 1.
        split: "train", "validation" or "test".
        segments: (tokenizer name, value) in the document's order.
        labels: of the segments; the tokenizer's name where the source gives none.
    """

    line: int
    split: str
    segments: list[tuple[str, Any]]
    labels: list[str]


class Source(ABC):
    """Documents in parts, which may be read at the same time, by several processes.

    A part gives the same records in the same order each time, as long as `fingerprint` is the same.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages call it: a file, a folder, the name of a data set."""

    @property
    @abstractmethod
    def cache(self) -> Path:
        """Where its shards of codes are kept if nobody says."""

    @property
    @abstractmethod
    def home(self) -> Path | None:
        """What names of files in it are relative to; None where there are none."""

    @abstractmethod
    def fingerprint(self) -> str:
        """All that decides the records, except the content of files that they name.

        Raises:
            ValueError: the source cannot be read; says what to do.
        """

    @abstractmethod
    def check(self, tokenizers: Collection[str]) -> None:
        """Refuse what can be seen to be wrong before anything is tokenized.

        Args:
            tokenizers: the names that there are.

        Raises:
            ValueError: a record that is none, a tokenizer that does not exist, no records; names the place.
        """

    @abstractmethod
    def parts(self) -> int:
        """How many parts there are."""

    @abstractmethod
    def read(self, part: int) -> Iterator[Record]:
        """The records of a part. Only those that are asked for are in memory.

        Raises:
            ValueError: a record that is none; names the place.
        """

    @abstractmethod
    def where(self, part: int, line: int) -> str:
        """The place of a record, for messages."""

    @abstractmethod
    def item(self, tokenizer: ModalityTokenizer, value: Any) -> Any:
        """The item that a value stands for, read by the tokenizer.

        Raises:
            multidiff.tokenizer.ItemError: it cannot be read.
        """

    def advice(self, split: str) -> str:
        """What to do if a split has no documents, as a sentence."""
        return f"Give it a split {split!r}."

    def states(self, values: Iterable[Any]) -> dict[str, tuple[int, int]]:
        """Bytes of each file that a value names, and when it was last written, in ns; nothing for other values."""
        return {}
