"""Walks: a small correct tokenizer of two levels, for tests to install as a plugin or to break."""

import hashlib
import json

import torch
from PIL import Image

from multidiff.tokenizer import Codes, ItemError, ModalityTokenizer


class Steps(ModalityTokenizer):
    """A walk: a list of floats in [0, 1], each coded as its tenth (level 0) and the hundredth within (level 1)."""

    modality = "walk"
    codebook_sizes = (10, 11)
    variable_length = True

    def __init__(self, scale: float = 1.0):
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    @torch.no_grad()
    def encode(self, items):
        return [self.one(item) for item in items]

    def one(self, item):
        if not isinstance(item, list):
            raise ItemError(f"a walk is a list of floats, not {item!r}")
        codes = self.canvas(steps=len(item))
        hundredths = (torch.tensor(item, dtype=torch.float64) * self.scale * 100).round().long()
        tenths = (hundredths // 10).clamp(max=9)
        codes.ids_N = torch.stack([tenths, hundredths - 10 * tenths], dim=1).flatten()
        return codes

    @torch.no_grad()
    def decode(self, codes):
        return [self.walk(one.ids_N.view(-1, 2)) for one in codes]

    def walk(self, pairs):
        return ((pairs[:, 0] * 10 + pairs[:, 1]).clamp(max=100) / (100 * self.scale)).tolist()

    def canvas(self, steps=4):
        if steps < 0:
            raise ValueError("a walk has at least 0 steps")
        step, level = torch.arange(steps).repeat_interleave(2), torch.arange(2).repeat(steps)
        coords = torch.stack([step, level, torch.zeros_like(step)], dim=1)
        return Codes(torch.zeros_like(step), level, coords, {"steps": steps})

    def read(self, value, folder):
        path = folder / value
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ItemError(f"{path} is no walk: {error}") from None

    def write(self, item, stem):
        path = stem.with_name(stem.name + ".json")
        path.write_text(json.dumps(item))
        return path

    def preview(self, item):
        return Image.new("L", (len(item) + 1, 8))

    def examples(self):
        return [[], [0.0, 1.0], [0.25, 0.5, 0.99]]

    @property
    def fingerprint(self):
        return hashlib.sha256(str(self.scale.item()).encode()).hexdigest()

    def save(self, folder):
        (folder / "steps.json").write_text(json.dumps({"scale": self.scale.item()}))

    @classmethod
    def load(cls, folder):
        path = folder / "steps.json"
        try:
            return cls(json.loads(path.read_text())["scale"])
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no walk tokenizer: {error}") from None


class Pairs(Steps):
    """Walks of two steps only: a tokenizer of one size."""

    variable_length = False

    def one(self, item):
        if not isinstance(item, list) or len(item) != 2:
            raise ItemError(f"a walk of two steps is wanted, not {item!r}")
        return super().one(item)

    def canvas(self, steps=2):
        if steps != 2:
            raise ValueError("only walks of 2 steps fit")
        return super().canvas(2)

    def examples(self):
        return [[0.0, 1.0], [0.25, 0.5]]
