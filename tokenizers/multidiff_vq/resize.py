"""Resizes images to a size that fits the model, in the same way in training and in use.

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
LARGEST_RATIO = 100  # of the longer side to the shorter; beyond, a resized image shows nothing of the original

_ADVICE = " Let the tokenizer resize it with `image: {plugin: vq, weights: ..., resize: crop}` (or pad, or fit)."
_METHOD = Image.Resampling.BICUBIC  # Pillow widens its filter for downscaling, which avoids aliasing


@dataclass(frozen=True)
class Resizer:
    """Resizes a greyscale or RGB image for a model with this stride.

    Attributes:
        resize: how an image of another size is resized:

            - `None`: it is not resized, and its size must be a multiple of the stride;
            - "crop": it is scaled to cover the canvas, and its middle is kept;
            - "pad": it is scaled to fit into the canvas, and centred on white;
            - "fit": it keeps its aspect ratio. Among the grids with at most as many codes as the canvas, the one with
              the nearest aspect ratio (by its logarithm) is chosen. The image is scaled to cover that grid, and equal
              parts are cut off on both sides.
        height, width: the size of the canvas in pixels.
        stride: pixels per code, in each direction.
    """

    resize: Resize | None
    height: int
    width: int
    stride: int

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize not in RESIZES:
            raise ValueError(f"resize must be null, {', '.join(RESIZES)}, got {self.resize!r:.80}")

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """The size of an image of this height and width after resizing.

        Raises:
            ItemError: the image has no pixels or is too long and thin, or `resize` is None and its size does not fit.
        """
        if self.resize is None:
            if problem := misfit(height, width, self.stride, _ADVICE):
                raise ItemError(f"an image {problem}")
            return height, width
        if min(height, width) < 1:
            raise ItemError("an image without pixels cannot be resized")
        if max(height, width) > LARGEST_RATIO * min(height, width):
            raise ItemError(
                f"an image of height {height} and width {width} pixels is too long and thin to be resized. The longer "
                f"side may be at most {LARGEST_RATIO} times the shorter side. Cut it into pieces."
            )
        if self.resize != "fit":
            return self.height, self.width
        grids = _grids(self.height // self.stride * (self.width // self.stride))
        rows, columns = min(grids, key=lambda grid: abs(math.log(grid[0] * width / (grid[1] * height))))
        return rows * self.stride, columns * self.stride

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Resize an image to the size from `size_of`.

        Raises:
            ItemError: as in `size_of`.
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
    """The reason why a size does not fit, with the nearest sizes that do; None if it fits.

    Args:
        height, width: the size in pixels, of any type.
        stride: pixels per code, in each direction.
        advice: a sentence to add, which begins with a space.
    """
    if any(type(side) is not int or side < 1 for side in (height, width)):
        return (
            f"must have a height and a width that are whole numbers of at least {stride} pixels, got height "
            f"{height!r:.80} and width {width!r:.80}."
        )
    if height * width > MOST_PIXELS:
        return f"of height {height:,} and width {width:,} is too large; the limit is {MOST_PIXELS:,} pixels."
    if height % stride == 0 and width % stride == 0:
        return None
    tall, wide = (
        " or ".join(str(fit) for fit in sorted({side // stride * stride, -(-side // stride) * stride} - {0}))
        for side in (height, width)
    )
    return (
        f"of height {height} and width {width} pixels does not fit the stride of {stride}.{advice} The nearest sizes "
        f"that fit are height {tall} and width {wide}."
    )


@lru_cache(maxsize=16)
def _grids(most: int) -> list[tuple[int, int]]:
    """(rows, columns) of the grids of at most `most` codes, not too long and thin, that have no room for more."""
    # No two of them have the same aspect ratio, so an image that already has such a size keeps it.
    flat = {(rows, most // rows) for rows in range(1, math.isqrt(most) + 1)}
    grids = flat | {(columns, rows) for rows, columns in flat}
    return sorted(
        (rows, columns) for rows, columns in grids if max(rows, columns) <= LARGEST_RATIO * min(rows, columns)
    )
