"""Melodies: one note after another, each with a pitch and a duration.

Shape suffixes: N codes of one melody (two for each note), M notes, 3 axes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from multidiff.tokenizer import Codes, ItemError, ModalityTokenizer


class MelodyTokenizer(ModalityTokenizer):
    """Melodies to codes: level 0 is the pitch, level 1 the duration.

    An item is a list of (pitch, duration): a MIDI pitch, 0 to 127, and a number of sixteenths, from 1.

    Args:
        longest: the longest duration, in sixteenths.
    """

    modality = "melody"
    variable_length = True

    def __init__(self, longest: int = 16):
        if longest < 1:
            raise ValueError(f"longest must be at least 1 sixteenth, not {longest}")
        self.longest = longest
        self.codebook_sizes = (128, longest)

    def encode(self, items: list[list[tuple[int, int]]]) -> list[Codes]:
        return [self._encode(item) for item in items]

    def decode(self, codes: list[Codes]) -> list[list[tuple[int, int]]]:
        return [[(pitch, code + 1) for pitch, code in one.ids_N.view(-1, 2).tolist()] for one in codes]

    def canvas(self, notes: int = 8) -> Codes:
        if notes < 0:
            raise ValueError(f"a melody of {notes} notes does not exist; the shortest has 0")
        note_N, level_N = torch.arange(notes).repeat_interleave(2), torch.arange(2).repeat(notes)
        coords_N3 = torch.stack([note_N, level_N, torch.zeros_like(note_N)], dim=1)
        return Codes(torch.zeros_like(note_N), level_N, coords_N3, {"notes": notes})

    def read(self, value: Any, folder: Path) -> list[tuple[int, int]]:
        """A JSON file such as [[60, 4], [62, 2], [64, 2]]."""
        path = Path(folder, str(value))
        try:
            return [(pitch, duration) for pitch, duration in json.loads(path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError) as error:
            raise ItemError(f"{path} is no JSON list of [pitch, duration]: {error}") from None

    def write(self, item: list[tuple[int, int]], stem: Path) -> Path:
        path = stem.with_name(stem.name + ".json")
        path.write_text(json.dumps(item), encoding="utf-8")
        return path

    def preview(self, item: list[tuple[int, int]]) -> Image.Image:
        """A piano roll: time to the right, pitch upwards."""
        roll = np.full((128, 1 + sum(duration for _, duration in item)), 255, np.uint8)
        start = 0
        for pitch, duration in item:
            roll[127 - pitch, start : start + duration] = 0
            start += duration
        return Image.fromarray(roll).resize((roll.shape[1] * 4, roll.shape[0] * 2), Image.Resampling.NEAREST)

    def examples(self) -> list[list[tuple[int, int]]]:
        return [[], [(60, 1)], [(60 + step, 1 + step % self.longest) for step in (0, 2, 4, 5, 7)]]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"melody {self.codebook_sizes}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "melody.json.part"
        part.write_text(json.dumps({"longest": self.longest}), encoding="utf-8")
        part.replace(folder / "melody.json")

    @classmethod
    def load(cls, folder: Path) -> Self:
        path = folder / "melody.json"
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is no saved melody tokenizer: {error}") from None

    def _encode(self, item: Any) -> Codes:
        try:
            pairs_M2 = torch.tensor(item, dtype=torch.int64).reshape(len(item), 2)
        except (TypeError, ValueError, RuntimeError):
            raise ItemError(f"a melody is a list of (pitch, duration), not {item!r}") from None
        codes = self.canvas(len(pairs_M2))
        codes.ids_N = (pairs_M2 - torch.tensor([0, 1])).flatten()
        if ((codes.ids_N < 0) | (codes.ids_N >= torch.tensor(self.codebook_sizes)[codes.levels_N])).any():
            raise ItemError(f"pitches go from 0 to 127 and durations from 1 to {self.longest}: {item!r}")
        return codes
