"""Throwaway tokenizers: items are lists of integers."""

import hashlib
import json
from pathlib import Path

import torch
from PIL import Image

from multidiff.tokenizer import Codes, ModalityTokenizer


class Grid(ModalityTokenizer):
    """Fixed length: a height × width grid of `size` symbols, row by row."""

    modality = "grid"
    variable_length = False

    def __init__(self, size=4, height=2, width=3):
        self.codebook_sizes = (size,)
        self.height, self.width = height, width

    def encode(self, items):
        return [self._codes(item, self.canvas()) for item in items]

    def _codes(self, item, canvas):
        return Codes(torch.tensor(item, dtype=torch.int64), canvas.levels_N, canvas.coords_N3, canvas.size)

    def decode(self, codes):
        return [code.ids_N.tolist() for code in codes]

    def canvas(self, height=None, width=None):
        height, width = height or self.height, width or self.width
        row_N = torch.arange(height).repeat_interleave(width)
        column_N = torch.arange(width).repeat(height)
        zero_N = torch.zeros_like(row_N)
        return Codes(zero_N, zero_N, torch.stack([zero_N, row_N, column_N], -1), {"height": height, "width": width})

    def read(self, value, folder):
        return value

    def write(self, item, stem):
        path = Path(stem).with_suffix(".json")
        path.write_text(json.dumps(item))
        return path

    def preview(self, item):
        return Image.new("L", (8, 8))

    def examples(self):
        return [[0] * (self.height * self.width)]

    @property
    def fingerprint(self):
        return hashlib.sha256(repr(self.codebook_sizes).encode()).hexdigest()

    def save(self, folder):
        (folder / "toy.json").write_text("{}")

    @classmethod
    def load(cls, folder):
        return cls()


class Frames(Grid):
    """Variable length: frames of `levels` symbols each."""

    modality = "frames"
    variable_length = True

    def __init__(self, sizes=(4, 3)):
        self.codebook_sizes = tuple(sizes)

    def encode(self, items):
        return [self._codes(item, self.canvas(frames=len(item) // len(self.codebook_sizes))) for item in items]

    def canvas(self, frames=3):
        levels = len(self.codebook_sizes)
        frame_N = torch.arange(frames).repeat_interleave(levels)
        level_N = torch.arange(levels).repeat(frames)
        zero_N = torch.zeros_like(frame_N)
        return Codes(zero_N, level_N, torch.stack([frame_N, level_N, zero_N], -1), {"frames": frames})

    def examples(self):
        return [[0] * len(self.codebook_sizes) * 2]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)
