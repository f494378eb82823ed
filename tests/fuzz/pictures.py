"""Picture files, damaged: each is read and encoded, or an `ItemError` names it. One that was cut off is never read in
part."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from multidiff.tokenizer import ItemError
from multidiff_vq import VQTokenizer
from tests.fuzz.damage import damage_content


@dataclass
class State:
    folder: Path
    contents: dict[str, bytes]  # of a file, by its name
    tokenizer: VQTokenizer


def prepare(folder: Path, random: Random) -> State:
    """Small pictures of many formats and modes, of sizes that fit no stride."""
    contents = {}
    for name, (format, mode, options) in _kinds().items():
        contents[name] = _written(_picture(mode, random), format, options)
    for depth, colour, name in ((8, 2, "interlaced.png"), (16, 0, "16.png"), (16, 2, "48.png"), (16, 6, "64.png")):
        contents[name] = _png(37, 29, depth, colour, random, clear=name == "16.png", interlaced=depth == 8)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return State(folder, contents, VQTokenizer("digits", resize="crop"))


def attempt(state: State, number: int, random: Random) -> str:
    """Damage one of the files, read and encode it."""
    names = sorted(state.contents)
    name = names[number % len(names)]
    whole = state.contents[name]
    damaged = _damage(whole, state.contents[random.choice(names)], random)
    path = state.folder / f"{number}.{name}"
    path.write_bytes(damaged)
    try:
        picture = state.tokenizer.read(path.name, state.folder)
        (codes,) = state.tokenizer.encode([picture])
    except ItemError as error:
        if str(path) not in str(error) or "\n" in str(error):
            raise AssertionError(f"no sentence that names the file: {error}") from error
        return "refused"
    finally:
        path.unlink()
    assert codes.size == {"height": 32, "width": 32}
    if whole.startswith(damaged):
        original = state.tokenizer.read(name, state.folder)
        assert np.array_equal(np.asarray(picture), np.asarray(original)), "read in part"
    return "encoded"


def _kinds() -> dict[str, tuple[str, str, dict]]:
    orientation = Image.Exif()
    orientation[0x0112] = 6
    return {
        "grey.png": ("PNG", "L", {}),
        "palette.png": ("PNG", "P", {"transparency": 3}),
        "alpha.png": ("PNG", "RGBA", {}),
        "two.png": ("PNG", "1", {}),
        "turned.jpg": ("JPEG", "RGB", {"exif": orientation}),
        "progressive.jpg": ("JPEG", "L", {"progressive": True}),
        "ink.jpg": ("JPEG", "CMYK", {}),
        "a.gif": ("GIF", "P", {"transparency": 0}),
        "a.bmp": ("BMP", "RGB", {}),
        "palette.bmp": ("BMP", "P", {}),
        "lossy.webp": ("WEBP", "RGB", {}),
        "lossless.webp": ("WEBP", "RGBA", {"lossless": True}),
        "a.tif": ("TIFF", "RGBA", {}),
        "lzw.tif": ("TIFF", "L", {"compression": "tiff_lzw"}),
        "deep.tif": ("TIFF", "I;16", {"compression": "tiff_deflate"}),
        "a.ppm": ("PPM", "RGB", {}),
        "a.tga": ("TGA", "RGB", {"compression": "tga_rle"}),
    }


def _picture(mode: str, random: Random) -> Image.Image:
    generator = np.random.default_rng(random.randrange(2**32))
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 2**16, (29, 37), dtype=np.uint16))
    return Image.fromarray(generator.integers(0, 256, (29, 37, 4), dtype=np.uint8)).convert("RGB").convert(mode)


def _written(picture: Image.Image, format: str, options: dict) -> bytes:
    content = BytesIO()
    picture.save(content, format, **options)
    return content.getvalue()


def _png(width: int, height: int, depth: int, colour: int, random: Random, clear: bool, interlaced: bool) -> bytes:
    """What Pillow writes no PNG of: 16 bits a channel, or Adam7."""
    bits = {0: 1, 2: 3, 6: 4}[colour] * depth
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = bytearray()
    for left, top, across, down in passes if interlaced else [(0, 0, 1, 1)]:
        columns = len(range(left, width, across))
        for _ in range(top, height, down) if columns else ():
            rows += b"\0" + random.randbytes(columns * bits // 8)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(rows))), (b"IEND", b"")]
    if clear:
        chunks.insert(1, (b"tRNS", bytes(rows[1:3])))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _damage(content: bytes, other: bytes, random: Random) -> bytes:
    damaged = damage_content(content, other, random)
    return _with_checksums(damaged) if random.random() < 0.5 else bytes(damaged)


def _with_checksums(damaged: bytearray) -> bytes:
    """A PNG's checksums made right, so that its damage gets farther than them."""
    place = 8
    while damaged.startswith(b"\x89PNG") and place + 12 <= len(damaged):
        end = place + 8 + int.from_bytes(damaged[place : place + 4], "big")
        if end + 4 > len(damaged):
            break
        damaged[end : end + 4] = struct.pack(">I", zlib.crc32(damaged[place + 4 : end]))
        place = end + 4
    return bytes(damaged)
