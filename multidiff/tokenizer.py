"""What every modality must offer: items in, codes out, and back.

A tokenizer turns items people have (`str`, `PIL.Image`, `Audio`, whatever a plugin defines) into `Codes`: integers
from small codebooks, each at a place on three axes. Nothing else in multidiff knows what an item is.

Shape suffixes: N codes of one item, 3 axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Audio:
    """A sound.

    Attributes:
        waveform: float32 [channels, samples] in [-1, 1].
        sample_rate: samples per second, Hz.
    """

    waveform: Tensor
    sample_rate: int


@dataclass
class Codes:
    """One item, tokenized. Never contains an end: `multidiff.sequence` adds and removes it.

    Attributes:
        ids_N: int64, local ids within their level, in [0, codebook_sizes[level]).
        levels_N: int64, the residual level (codebook) of each id; 0 where there is one codebook.
        coords_N3: int64 ≥ 0, coordinates on the three axes: text (i, i, i), image (0, row, column),
            audio (frame, level, 0).
        size: what `ModalityTokenizer.canvas` takes back, e.g. {"height": 32, "width": 32}, {"frames": 30},
            {"tokens": 12}. A tokenizer of variable length has exactly one entry: its length.
    """

    ids_N: Tensor
    levels_N: Tensor
    coords_N3: Tensor
    size: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.ids_N.numel()


class ItemError(ValueError):
    """An item that cannot be read or tokenized; the message names it and says what to do."""


class ModalityTokenizer(ABC):
    """The contract of a tokenizer plugin; `multidiff.testing.check_tokenizer` tests all of it.

    Encoding and decoding are batched, deterministic, without gradient, and leave the global random state alone.
    A constructor takes plain values (numbers, strings, paths) only, so that YAML can configure it.

    Attributes:
        modality: what a person perceives: "text", "image", "audio" or any other word.
        codebook_sizes: number of codes of each residual level.
        variable_length: whether items differ in length. Then `size` has one entry, and the canvas of a shorter item
            is a prefix of the canvas of a longer one.
    """

    modality: str
    codebook_sizes: tuple[int, ...]
    variable_length: ClassVar[bool]

    @abstractmethod
    def encode(self, items: list[Any]) -> list[Codes]:
        """Items to codes, in order. Raises `ItemError` for an item that it cannot represent."""

    @abstractmethod
    def decode(self, codes: list[Codes]) -> list[Any]:
        """Codes to items, in order. Any codes within the codebooks decode to a valid item, none included."""

    @abstractmethod
    def canvas(self, **size: int) -> Codes:
        """A blank of a given size: right levels and coordinates, ids all 0. Every argument has a default.

        Raises:
            ValueError: a size that no item can have, naming the nearest that fits.
        """

    @abstractmethod
    def read(self, value: Any, folder: Path) -> Any:
        """The item that a data folder's `metadata.jsonl` names by `value`: the text itself, or a path from `folder`.

        Raises `ItemError` when the file is missing or damaged.
        """

    @abstractmethod
    def write(self, item: Any, stem: Path) -> Path:
        """Write an item beside `stem` with the usual suffix (`.txt`, `.png`, `.wav` …); returns the file's path."""

    @abstractmethod
    def preview(self, item: Any) -> Image.Image:
        """A picture of the item for logs and reports: itself, its spectrogram, its words."""

    @abstractmethod
    def examples(self) -> list[Any]:
        """A few items, made without files, that show the range of what it takes; used by tests and previews."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of all that decides what a code means (weights, merges, settings)."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write everything `load` needs into `folder` (safetensors, JSON; no pickle)."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> Self:
        """The tokenizer saved in `folder`. Runs no code from it; raises `ValueError` naming a bad file."""

    def to(self, device: torch.device | str) -> Self:
        """Move whatever computes to `device`; `encode` and `decode` take and return CPU items all the same."""
        return self
