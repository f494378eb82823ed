"""Tokenizes signals, which are lists of numbers. Each number is rounded to one of a few steps.

Shape suffixes: N codes of one signal, 3 axes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image, ImageDraw

from multidiff.tokenizer import Codes, ItemError, ModalityTokenizer


class SeriesTokenizer(ModalityTokenizer):
    """Encodes each number of a signal as one code.

    An item is a list of numbers from `low` to `high`. A file contains one number per line.

    Args:
        steps: the number of values to round to.
        low, high: the smallest and the largest value.
    """

    modality = "series"
    variable_length = True

    def __init__(self, steps: int = 256, low: float = -1.0, high: float = 1.0):
        if steps < 2 or not low < high:
            raise ValueError(f"steps must be at least 2 and low less than high, got {steps}, {low} and {high}")
        self.settings = {"steps": steps, "low": low, "high": high}
        self.low, self.step = low, (high - low) / (steps - 1)
        self.codebook_sizes = (steps,)

    def encode(self, items: list[list[float]]) -> list[Codes]:
        return [self._encode(item) for item in items]

    def decode(self, codes: list[Codes]) -> list[list[float]]:
        return [(self.low + self.step * one.ids_N.double()).tolist() for one in codes]

    def canvas(self, samples: int = 32) -> Codes:
        if samples < 0:
            raise ValueError(f"a signal cannot have {samples} samples; the smallest number is 0")
        place_N = torch.arange(samples)
        zero_N = torch.zeros_like(place_N)
        return Codes(zero_N, zero_N, torch.stack([place_N, zero_N, zero_N], dim=1), {"samples": samples})

    def read(self, value: Any, folder: Path) -> list[float]:
        path = Path(folder, str(value))
        try:
            return [float(line) for line in path.read_text(encoding="utf-8").split()]
        except (OSError, ValueError) as error:
            raise ItemError(f"{path} must contain one number per line: {error}") from None

    def write(self, item: list[float], stem: Path) -> Path:
        path = stem.with_name(stem.name + ".csv")
        path.write_text("".join(f"{number}\n" for number in item), encoding="utf-8")
        return path

    def preview(self, item: list[float]) -> Image.Image:
        """The curve of the signal, with four pixels per number."""
        picture = Image.new("L", (4 * max(2, len(item)), 96), "white")
        scale = 95 / (self.step * (self.codebook_sizes[0] - 1))
        points = [(4 * place, 95 - scale * (number - self.low)) for place, number in enumerate(item)]
        ImageDraw.Draw(picture).line(points, width=2)
        return picture

    def examples(self) -> list[list[float]]:
        return [[], [self.low], [self.low + self.step * (place * place % self.codebook_sizes[0]) for place in range(9)]]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"series {self.settings}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "series.json.part"
        part.write_text(json.dumps(self.settings), encoding="utf-8")
        part.replace(folder / "series.json")

    @classmethod
    def load(cls, folder: Path) -> Self:
        path = folder / "series.json"
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is missing, damaged, or not a SeriesTokenizer: {error}") from None

    def _encode(self, item: Any) -> Codes:
        try:
            number_N = torch.tensor(item, dtype=torch.float64).reshape(len(item))
        except (TypeError, ValueError, RuntimeError):
            raise ItemError(f"a signal must be a list of numbers, not {item!r:.60}") from None
        codes = self.canvas(len(number_N))
        ids_N = ((number_N - self.low) / self.step).round()
        if not ((ids_N >= 0) & (ids_N < self.codebook_sizes[0])).all():
            raise ItemError(f"numbers must be from {self.settings['low']} to {self.settings['high']}: {item!r:.60}")
        codes.ids_N = ids_N.long()
        return codes
