"""Reads and writes image files, and converts images to tensors and back.

Shape suffixes: C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from multidiff.files import check_file, write_bytes
from multidiff.tokenizer import ItemError

MODES = {1: "L", 3: "RGB"}  # Pillow's mode by number of channels
_DETOURS = {"LAB": "RGB", "La": "LA"}  # modes that Pillow converts only to these
MOST_PIXELS = 2**26  # per file: 8,192 × 8,192


def read_picture(path: Path) -> Image.Image:
    """Read the first image in a file, and turn it upright as its EXIF tag says.

    Raises:
        ItemError: the file is missing, is not a complete image, has a mode that `convert` refuses, or has more than
            `MOST_PIXELS`, which a file of some hundred bytes can declare; the message names the file.
    """
    with _opened(path) as picture:
        picture.load()
        upright = ImageOps.exif_transpose(_in_16_bits(picture))
    with naming_picture(path):
        _check_mode(upright)
    return upright


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of the image that `read_picture` returns, from the beginning of the file.

    Raises:
        ItemError: as in `read_picture`, but damage after the beginning goes unnoticed.
    """
    with _opened(path) as picture:
        # Pillow itself turns TIFF files upright.
        turned = picture.format != "TIFF" and picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        width, height = picture.size
        return (width, height) if turned else (height, width)


@contextmanager
def naming_picture(path: Path) -> Iterator[None]:
    """Add the name of the file to an `ItemError` inside the block."""
    try:
        yield
    except ItemError as error:
        raise ItemError(f"{path}: {error}") from None


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        check_file(path)
    except ValueError as error:
        raise ItemError(f"{error}. A relative path starts at the folder of metadata.jsonl.") from None
    try:
        # Given a path, Pillow would map the file into memory, and garble TIFF files that it turns.
        with path.open("rb") as file, Image.open(file, formats=_formats()) as picture:
            if picture.width * picture.height > MOST_PIXELS:  # before anything is decompressed
                raise ItemError(
                    f"{path} has {picture.width:,} × {picture.height:,} pixels, but the limit is {MOST_PIXELS:,}. "
                    "Scale it down."
                )
            yield picture
    except ItemError:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit is higher
        raise ItemError(f"{path} has more pixels than the limit of {MOST_PIXELS:,}. Scale it down.") from None
    except UnidentifiedImageError:
        raise ItemError(
            f"{path} is not a readable image (unknown format). Replace the file or remove its line."
        ) from None
    except Exception as error:  # Pillow's decoders raise a dozen different types on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ItemError(f"{path} is not a readable image ({reason}). Replace the file or remove its line.") from error


@cache
def _formats() -> tuple[str, ...]:
    """The formats that Pillow reads, except PostScript, for which Pillow runs Ghostscript."""
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - {"EPS"}))


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG file, as a whole or not at all."""
    content = BytesIO()
    picture.save(content, "PNG")
    write_bytes(path, content.getvalue())


def convert(picture: Any, mode: str) -> Image.Image:
    """Convert an image of any 8- or 16-bit mode to greyscale (ITU-R 601 luma) or RGB. Transparent parts become white.

    Args:
        picture: a `PIL.Image`.
        mode: "L" or "RGB".

    Raises:
        ItemError: `picture` is not an image, or has 32-bit pixels, whose range is not defined.
    """
    if not isinstance(picture, Image.Image):
        raise ItemError(f"expected a PIL.Image, not {type(picture).__name__}: {str(picture)[:40]!r}")
    picture = _in_16_bits(picture)
    _check_mode(picture)
    if picture.mode.startswith("I;16"):  # Pillow's own conversion clips everything above 255 to white
        deep = np.asarray(picture)
        shallow = (deep >> 8).astype(np.uint8)
        clear = picture.info.get("transparency")  # the grey level that a PNG declares transparent
        picture = Image.fromarray(shallow if clear is None else np.where(deep == clear, np.uint8(255), shallow))
    if picture.mode in _DETOURS:
        picture = picture.convert(_DETOURS[picture.mode])
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture if picture.mode == mode else picture.convert(mode)


def _in_16_bits(picture: Image.Image) -> Image.Image:
    """Restore 16-bit pixels of a PGM file with more than 8 bits, which Pillow scales to 16 and stores in 32 bits."""
    if picture.format != "PPM" or picture.mode != "I":
        return picture
    return Image.fromarray(np.asarray(picture).astype(np.uint16))


def _check_mode(picture: Image.Image) -> None:
    if picture.mode in ("I", "F"):
        raise ItemError(f"an image of mode {picture.mode!r} has no defined range. Scale it to 8 bits first.")


def to_pixels(picture: Image.Image) -> Tensor:
    """A greyscale or RGB image as uint8 [C, H, W]."""
    array = np.array(picture, dtype=np.uint8)
    return torch.from_numpy(array.reshape(picture.height, picture.width, -1)).permute(2, 0, 1).contiguous()


def from_pixels(pixels_CHW: Tensor) -> Image.Image:
    """The inverse of `to_pixels`."""
    array = pixels_CHW.permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array))


def to_signal(pixels: Tensor) -> Tensor:
    """Convert uint8 to the input of a `VQModel`: float32, from -1 (black) to 1 (white)."""
    return pixels.float() / 127.5 - 1


def from_signal(signal: Tensor) -> Tensor:
    """The inverse of `to_signal`, rounded and clamped to uint8."""
    return ((signal.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
