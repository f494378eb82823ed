"""The contract of a tokenizer: it encodes items as codes, and decodes codes to items.

An item is what people have: a `str`, a `PIL.Image`, an `Audio`, or whatever a plugin defines. `Codes` are integers from
small codebooks, each with coordinates on three axes. Nothing else in multidiff knows what an item is.

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
    """The codes of one item. They never contain an EOS, which `multidiff.sequence` adds and removes.

    Attributes:
        ids_N: int64, local ids within their level, in [0, codebook_sizes[level]).
        levels_N: int64, the residual level (codebook) of each id; 0 if there is only one codebook.
        coords_N3: int64 ≥ 0, coordinates on the three axes: text (i, i, i), image (0, row, column),
            audio (frame, level, 0).
        size: the arguments of `ModalityTokenizer.canvas` for this item, for instance {"height": 32, "width": 32},
            {"frames": 30} or {"tokens": 12}. For a tokenizer of variable length it has exactly one entry, the length.

    Examples:
        A text of three codes, which stand in a line:

        >>> place = torch.arange(3)
        >>> codes = Codes(torch.tensor([7, 4, 7]), torch.zeros(3, dtype=torch.int64), place[:, None].expand(3, 3))
        >>> len(codes), codes.coords_N3[2].tolist()
        (3, [2, 2, 2])
    """

    ids_N: Tensor
    levels_N: Tensor
    coords_N3: Tensor
    size: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.ids_N.numel()


class ItemError(ValueError):
    """An item that cannot be read or tokenized. The message names the item and says what to do."""


class ModalityTokenizer(ABC):
    """The contract of a tokenizer plugin. `multidiff.testing.check_tokenizer` tests all of it.

    Encoding and decoding are batched and deterministic. They record no gradient and do not touch the global random
    state. The constructor takes only plain values (numbers, strings, paths), so that YAML can configure it.

    Attributes:
        modality: what a person perceives: "text", "image", "audio" or any other word.
        codebook_sizes: the number of codes of each residual level.
        variable_length: whether items differ in length. If so, `size` has one entry, and the canvas of a shorter item
            is a prefix of the canvas of a longer item.
    """

    modality: str
    codebook_sizes: tuple[int, ...]
    variable_length: ClassVar[bool]

    @abstractmethod
    def encode(self, items: list[Any]) -> list[Codes]:
        """Encode items, in order. Raises `ItemError` for an item that it cannot represent."""

    @abstractmethod
    def decode(self, codes: list[Codes]) -> list[Any]:
        """Decode codes, in order. Any codes within the codebooks, including none, decode to a valid item."""

    @abstractmethod
    def canvas(self, **size: int) -> Codes:
        """The codes of a blank item of this size: its levels and coordinates, with all ids 0.

        Every argument has a default.

        Raises:
            ValueError: no item can have this size; the message names the nearest possible size.
        """

    @abstractmethod
    def read(self, value: Any, folder: Path) -> Any:
        """The item of a `value` in `metadata.jsonl`, which is the text itself or a path relative to the data folder.

        Raises `ItemError` if the file is missing or damaged.
        """

    @abstractmethod
    def write(self, item: Any, stem: Path) -> Path:
        """Write an item to the path `stem` plus the usual suffix (`.txt`, `.png`, `.wav` …), and return that path."""

    @abstractmethod
    def preview(self, item: Any) -> Image.Image:
        """A picture of the item for logs and reports: the item itself, its spectrogram, or its words."""

    @abstractmethod
    def examples(self) -> list[Any]:
        """A few items, created without files, that cover the range of valid items. Tests and previews use them."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hex digest of everything that determines the meaning of a code: weights, merges, settings."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write everything that `load` needs into `folder`, as safetensors and JSON. Pickle is not allowed."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> Self:
        """The tokenizer saved in `folder`. Runs no code from it. Raises a `ValueError` that names a damaged file."""

    def dimensions(self, codes: Codes) -> tuple[float, str] | None:
        """How large the item of these codes is, and the unit: (13, "byte"), (0.8, "second"), or (3072, "dimension") for
        32×32 pixels of three channels.

        The unit must not depend on the tokenizer, and is the same for all codes. Likelihoods are also reported in bits
        per unit, which compares models with different tokenizers. None, the default, means that items have no unit.
        """
        return None

    def to(self, device: torch.device | str) -> Self:
        """Move the computation to `device`. `encode` and `decode` still take and return items on the CPU."""
        return self
