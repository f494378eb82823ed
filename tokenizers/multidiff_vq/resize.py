"""Pictures of any size brought to one that the model takes: the same function in training and in use.

Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from PIL import Image, ImageOps

from multidiff.tokenizer import ItemError
from multidiff_vq.pictures import MOST_PIXELS

Resize = Literal["crop", "pad", "fit"]
RESIZES: tuple[str, ...] = get_args(Resize)
LARGEST_RATIO = 100  # of the longer side to the shorter: beyond, a resized picture shows nothing of the original

_ADVICE = "let its tokenizer resize it, as in `image: {plugin: vq, weights: ..., resize: crop}` (or pad, or fit); "
_METHOD = Image.Resampling.BICUBIC  # Pillow widens it where it scales down, so nothing is aliased


@dataclass(frozen=True)
class Resizer:
    """Brings a grey or RGB picture to a size that a model of this stride takes, on account of a canvas.

    Attributes:
        resize: what happens to a picture of another size:

            - `None`: only sizes that fit the stride are accepted, and they stay as they are;
            - "crop": it is scaled to cover the canvas, and the middle is kept;
            - "pad": it is scaled to fit inside the canvas, in the middle, on white;
            - "fit": it keeps its shape. Of the grids with at most as many codes as the canvas, it gets the one whose
              height-to-width ratio is nearest to its own (by the logarithm); it is scaled to cover that, and the
              overhang is cut off on both sides alike.
        height, width: pixels of the canvas.
        stride: pixels of a code.
    """

    resize: Resize | None
    height: int
    width: int
    stride: int

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize not in RESIZES:
            raise ValueError(f"resize must be null, {', '.join(RESIZES)}, not {self.resize!r:.80}")

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """The size that a picture of this height and width gets.

        Raises:
            ItemError: it has no pixels, is too long and thin to be resized, or does not fit where nothing is resized.
        """
        if self.resize is None:
            if problem := misfit(height, width, self.stride, _ADVICE):
                raise ItemError(f"a picture {problem}")
            return height, width
        if min(height, width) < 1:
            raise ItemError("a picture without any pixels cannot be resized")
        if max(height, width) > LARGEST_RATIO * min(height, width):
            raise ItemError(
                f"a picture of height {height} and width {width} pixels is too long and thin to be resized: the longer "
                f"side may be {LARGEST_RATIO} times the shorter one; cut it into pieces"
            )
        if self.resize != "fit":
            return self.height, self.width
        grids = _grids(self.height // self.stride * (self.width // self.stride))
        rows, columns = min(grids, key=lambda grid: abs(math.log(grid[0] * width / (grid[1] * height))))
        return rows * self.stride, columns * self.stride

    def __call__(self, picture: Image.Image) -> Image.Image:
        """The picture at `size_of` its size.

        Raises:
            ItemError: as `size_of` has it.
        """
        height, width = self.size_of(picture.height, picture.width)
        if picture.size == (width, height):
            return picture
        if self.resize != "pad":
            return ImageOps.fit(picture, (width, height), _METHOD)
        scale = min(height / picture.height, width / picture.width)
        inner = [max(1, round(scale * side)) for side in picture.size]
        padded = Image.new(picture.mode, (width, height), "white")
        padded.paste(picture.resize((inner[0], inner[1]), _METHOD), ((width - inner[0]) // 2, (height - inner[1]) // 2))
        return padded


def misfit(height: Any, width: Any, stride: int, advice: str = "") -> str | None:
    """What is wrong with a size, and the nearest that fit; None where it fits.

    Args:
        height, width: pixels, as somebody gave them.
        stride: pixels of a code.
        advice: what else can be done about a size that does not fit.
    """
    if any(type(side) is not int or side < 1 for side in (height, width)):
        return (
            f"must have a height and a width that are whole numbers of at least {stride} pixels, got height "
            f"{height!r:.80} and width {width!r:.80}"
        )
    if height * width > MOST_PIXELS:
        return f"of height {height:,} and width {width:,} is too large: it may have at most {MOST_PIXELS:,} pixels"
    if height % stride == 0 and width % stride == 0:
        return None
    tall, wide = (
        " or ".join(str(fit) for fit in sorted({side // stride * stride, -(-side // stride) * stride} - {0}))
        for side in (height, width)
    )
    return (
        f"of height {height} and width {width} pixels does not fit the stride of {stride}; "
        f"{advice}the nearest that fit: height {tall}, width {wide}"
    )


@lru_cache(maxsize=16)
def _grids(most: int) -> list[tuple[int, int]]:
    """(rows, columns) of at most so many codes, not too long and thin, to which no row and no column can be added."""
    # A picture that already has such a size keeps it: no two of them have the same ratio.
    flat = {(rows, most // rows) for rows in range(1, math.isqrt(most) + 1)}
    grids = flat | {(columns, rows) for rows, columns in flat}
    return sorted(
        (rows, columns) for rows, columns in grids if max(rows, columns) <= LARGEST_RATIO * min(rows, columns)
    )
