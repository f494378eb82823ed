"""Class maps: a class for every pixel, as a segmentation gives it.

Shape suffixes: H height and W width in pixels, R rows and C columns of cells, K classes, N codes, 3 axes.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from multidiff.tokenizer import Codes, ItemError, ModalityTokenizer


class LabelMapTokenizer(ModalityTokenizer):
    """Class maps to codes: one code a cell, the class that most of its pixels have, the lowest among equals.

    An item is a uint8 array [H, W] of classes; a file is a PNG whose pixels (grey, or places of a palette) are classes.

    Args:
        classes: how many there are, up to 256.
        cell: height and width of a cell, pixels.
    """

    modality = "class map"
    variable_length = False

    def __init__(self, classes: int = 16, cell: int = 4):
        if not 1 <= classes <= 256 or cell < 1:
            raise ValueError(f"classes {classes} must be 1 to 256, and cell {cell} at least 1")
        self.classes, self.cell = classes, cell
        self.codebook_sizes = (classes,)

    def encode(self, items: list[np.ndarray]) -> list[Codes]:
        return [self._encode(item) for item in items]

    def decode(self, codes: list[Codes]) -> list[np.ndarray]:
        return [self._decode(one) for one in codes]

    def canvas(self, height: int = 32, width: int = 32) -> Codes:
        if min(height, width) < self.cell or height % self.cell or width % self.cell:
            fits = [max(1, round(size / self.cell)) * self.cell for size in (height, width)]
            raise ValueError(f"a class map of {height} × {width} has no whole cells; {fits[0]} × {fits[1]} does")
        rows, columns = height // self.cell, width // self.cell
        row_N, column_N = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
        zero_N = torch.zeros_like(row_N)
        coords_N3 = torch.stack([zero_N, row_N, column_N], dim=1)
        return Codes(zero_N, zero_N, coords_N3, {"height": height, "width": width})

    def read(self, value: Any, folder: Path) -> np.ndarray:
        path = Path(folder, str(value))
        try:
            with Image.open(path) as picture:
                if picture.mode not in ("L", "P"):
                    raise ValueError(f"its pixels are of mode {picture.mode}; classes are grey (L) or a palette's (P)")
                return np.asarray(picture)
        except (OSError, ValueError, SyntaxError) as error:
            raise ItemError(f"{path} is no class map: {error}") from None

    def write(self, item: np.ndarray, stem: Path) -> Path:
        path = stem.with_name(stem.name + ".png")
        Image.fromarray(item).save(path)
        return path

    def preview(self, item: np.ndarray) -> Image.Image:
        """Every class in a colour of its own; class 0 is black."""
        hues = [colorsys.hsv_to_rgb(number * 0.618 % 1, 0.7, 0.95) for number in range(256)]
        colour_K3 = np.round(255 * np.array([(0, 0, 0), *hues[1:]])).astype(np.uint8)
        return Image.fromarray(colour_K3[item])

    def examples(self) -> list[np.ndarray]:
        row_H1, column_1W = np.arange(8 * self.cell)[:, None], np.arange(6 * self.cell)[None]
        bands_HW = (row_H1 + column_1W) // (2 * self.cell) % self.classes
        return [np.zeros((self.cell, self.cell), np.uint8), bands_HW.astype(np.uint8)]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"labelmap {self.classes} {self.cell}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "labelmap.json.part"
        part.write_text(json.dumps({"classes": self.classes, "cell": self.cell}), encoding="utf-8")
        part.replace(folder / "labelmap.json")

    @classmethod
    def load(cls, folder: Path) -> Self:
        path = folder / "labelmap.json"
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is no saved tokenizer of class maps: {error}") from None

    def _encode(self, item: Any) -> Codes:
        if not isinstance(item, np.ndarray) or item.dtype != np.uint8 or item.ndim != 2:
            raise ItemError(f"a class map is a uint8 array [height, width], not {item!r:.60}")
        if item.max(initial=0) >= self.classes:
            raise ItemError(
                f"class {item.max()} is none of the {self.classes}; give `classes: {item.max() + 1}` or more"
            )
        try:
            codes = self.canvas(*item.shape)
        except ValueError as error:
            raise ItemError(str(error)) from None
        cells_RCHW = item.reshape(item.shape[0] // self.cell, self.cell, -1, self.cell).swapaxes(1, 2)
        number_RCK = (cells_RCHW[..., None] == np.arange(self.classes)).sum((2, 3))
        codes.ids_N = torch.from_numpy(number_RCK.argmax(-1).flatten())
        return codes

    def _decode(self, codes: Codes) -> np.ndarray:
        ids_RC = codes.ids_N.view(codes.size["height"] // self.cell, -1).numpy().astype(np.uint8)
        return ids_RC.repeat(self.cell, axis=0).repeat(self.cell, axis=1)
