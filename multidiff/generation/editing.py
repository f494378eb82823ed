"""Editing: parts of an item masked and generated again, the rest kept bit for bit.

    cut = inpaint(pipe, "image", picture, mask)
    out = pipe([[Given("text", "seven"), cut]])

A `Masked` is a segment that stands in a document like any other. Codes are what is kept, bit for bit: a picture comes
back as its tokenizer decodes them. All modalities at once is no edit, but a document of blanks.

Shape suffixes: N codes of a segment or document, M of a part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from multidiff.generation.pipeline import MultiDiffPipeline
from multidiff.generation.requests import Filled, Given, Masked
from multidiff.tokenizer import Codes


def infill(pipe: MultiDiffPipeline, tokenizer: str, before: Any, after: Any, **size: int) -> Masked:
    """A masked passage between two items that are kept: `infill(pipe, "text", "the", "is a seven", tokens=2)`.

    Args:
        size: how long the passage is, in the tokenizer's unit: tokens of a text, frames of a sound.

    Raises:
        ValueError: a tokenizer whose items have a fixed length, another unit, or a passage without any.
    """
    number = _units(pipe, tokenizer, "infill", size)
    first, last = pipe.tokenizers[tokenizer].encode([before, after])
    (unit, start), (_, end) = *first.size.items(), *last.size.items()
    canvas = pipe.tokenizers[tokenizer].canvas(**{unit: start + number + end})
    masked = len(canvas) - len(first) - len(last)
    ids_N = torch.cat([first.ids_N, canvas.ids_N[:masked], last.ids_N])
    known_N = torch.ones(len(canvas), dtype=torch.bool)
    known_N[len(first) : len(first) + masked] = False
    return Masked(tokenizer, replace(canvas, ids_N=ids_N), known_N)


def extend(pipe: MultiDiffPipeline, tokenizer: str, item: Any, **max_new: int) -> Masked:
    """An item and what follows it: `extend(pipe, "text", "the digit", max_new_tokens=8)`. The model decides where it
    ends.

    Args:
        max_new: `max_new_tokens` of a text, `max_new_frames` of a sound: the unit is the tokenizer's.

    Raises:
        ValueError: a tokenizer whose items have a fixed length, another unit, or nothing new.
    """
    number = _units(pipe, tokenizer, "extend", max_new, "max_new_")
    (codes,) = pipe.tokenizers[tokenizer].encode([item])
    return Masked(tokenizer, codes, torch.ones(len(codes), dtype=torch.bool), number)


def gap(pipe: MultiDiffPipeline, tokenizer: str, item: Any, start: float, end: float) -> Masked:
    """An item of varying length whose codes from `start` to `end` are generated again, both shares of its length.

    Raises:
        ValueError: a tokenizer whose items have a fixed length, or no code between the two.
    """
    _must_vary(pipe, tokenizer, "gap")
    (codes,) = pipe.tokenizers[tokenizer].encode([item])
    ((unit, length),) = codes.size.items()
    unit_N = torch.arange(len(codes)) // max(1, len(codes) // max(1, length))
    unknown_N = (unit_N + 1 > start * length) & (unit_N < end * length)
    if not 0 <= start < end <= 1 or not bool(unknown_N.any()):
        raise ValueError(f"gap needs 0 <= start < end <= 1 with one of {length} {unit} between, got {start}, {end}")
    return Masked(tokenizer, codes, ~unknown_N)


def inpaint(pipe: MultiDiffPipeline, tokenizer: str, picture: Any, mask: Image.Image) -> Masked:
    """A picture whose codes under the bright pixels of `mask` are generated again: any code whose cell holds one.

    Raises:
        ValueError: a tokenizer whose codes are no grid of pixels, a mask of another size than the picture, nothing
            masked.
    """
    (codes,) = pipe.tokenizers[tokenizer].encode([picture])
    height, width = _pixels(tokenizer, codes)
    if mask.size != (width, height):
        raise ValueError(f"inpaint: the mask is {mask.width}x{mask.height} pixels, the picture {width}x{height}")
    rows, columns = _cells(codes)
    bright = torch.frombuffer(bytearray(mask.convert("L").tobytes()), dtype=torch.uint8).view(1, height, width) > 127
    unknown = F.adaptive_max_pool2d(bright.float(), (rows, columns))[0] > 0
    unknown_N = unknown[codes.coords_N3[:, 1], codes.coords_N3[:, 2]]
    if not bool(unknown_N.any()):
        raise ValueError("inpaint: the mask has no bright pixel; white marks what to generate again")
    return Masked(tokenizer, codes, ~unknown_N)


def outpaint(
    pipe: MultiDiffPipeline, tokenizer: str, picture: Any, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> Masked:
    """A larger picture around `picture`, by so many pixels on each side.

    Raises:
        ValueError: a tokenizer whose codes are no grid of pixels, nothing to add, or borders that are not whole cells.
    """
    (codes,) = pipe.tokenizers[tokenizer].encode([picture])
    height, width = _pixels(tokenizer, codes)
    rows, columns = _cells(codes)
    down, across = height // rows, width // columns
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    for side, pixels in sides.items():
        cell = across if side in ("left", "right") else down
        if pixels < 0 or pixels % cell:
            raise ValueError(
                f"outpaint: {side} {pixels} must be a multiple of {cell} pixels, the size of a code's cell"
            )
    if not any(sides.values()):
        raise ValueError("outpaint: nothing to add; set left, top, right or bottom")
    canvas = pipe.tokenizers[tokenizer].canvas(height=height + top + bottom, width=width + left + right)
    row_N = canvas.coords_N3[:, 1] - top // down
    column_N = canvas.coords_N3[:, 2] - left // across
    known_N = (row_N >= 0) & (row_N < rows) & (column_N >= 0) & (column_N < columns)
    grid = torch.zeros(rows, columns, dtype=torch.int64)
    grid[codes.coords_N3[:, 1], codes.coords_N3[:, 2]] = codes.ids_N
    ids_N = torch.where(known_N, grid[row_N.clamp(0, rows - 1), column_N.clamp(0, columns - 1)], canvas.ids_N)
    return Masked(tokenizer, replace(canvas, ids_N=ids_N), known_N)


def refine(document: Sequence[Filled], share: float = 0.2) -> list[Given | Masked]:
    """A document whose least confident codes are to be generated again, by their probability when they were decided.

    Args:
        document: as the pipeline returned it; what was given to it stays.
        share: of the codes that were made, in (0, 1]; at least one.

    Raises:
        ValueError: a share outside (0, 1], or a document of which nothing was made.
    """
    if not 0 < share <= 1:
        raise ValueError(f"refine needs a share in (0, 1], got {share}")
    probs_N = torch.cat([part.probs_N for part in document]).nan_to_num(torch.inf)
    number = int(probs_N.isfinite().sum())
    if not number:
        raise ValueError("refine: nothing of this document was made; give it one that the pipeline returned")
    known_N = torch.ones(len(probs_N), dtype=torch.bool)
    known_N[probs_N.argsort(stable=True)[: max(1, round(share * number))]] = False
    known = known_N.split([len(part.probs_N) for part in document])
    return [
        Given(part.tokenizer, part.item) if part.given else Masked(part.tokenizer, part.codes, known_M)
        for part, known_M in zip(document, known, strict=True)
    ]


def _units(pipe: MultiDiffPipeline, tokenizer: str, what: str, size: Mapping[str, int], prefix: str = "") -> int:
    """The one value of `size`, whose key must be the unit of the tokenizer's length."""
    _must_vary(pipe, tokenizer, what)
    unit = next(iter(pipe.tokenizers[tokenizer].canvas().size))
    if size.keys() != {prefix + unit}:
        said = ", ".join(size) or "nothing"
        raise ValueError(
            f"{what}: the length of {tokenizer!r} is counted in {unit}, so give {prefix}{unit}, not {said}"
        )
    (number,) = size.values()
    if number < 1:
        raise ValueError(f"{what} needs at least 1 of {prefix}{unit}, got {number}")
    return number


def _must_vary(pipe: MultiDiffPipeline, tokenizer: str, what: str) -> None:
    if not pipe.vocabulary.layout(tokenizer).variable_length:
        raise ValueError(f"{what} needs items whose length varies, which those of {tokenizer!r} do not; see inpaint")


def _pixels(tokenizer: str, codes: Codes) -> tuple[int, int]:
    if not {"height", "width"} <= codes.size.keys():
        raise ValueError(f"{tokenizer!r} has no height and width: only pictures are painted on")
    if bool(codes.levels_N.any()):
        raise ValueError(f"{tokenizer!r} has several codes a cell: only pictures of one level are painted on")
    return codes.size["height"], codes.size["width"]


def _cells(codes: Codes) -> tuple[int, int]:
    return int(codes.coords_N3[:, 1].max()) + 1, int(codes.coords_N3[:, 2].max()) + 1
