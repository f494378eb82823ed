"""Damage to files and to the values in them, drawn at random."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

ODD: list[Any] = [None, True, False, -1, 0, 1, 3, 2**31, 10**9, 10**30, 0.5, 1e-320, 1e308, "", "x", "1", [], [0], {}]
_NUMBERS = (0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def damage_bytes(path: Path, random: Random) -> str:
    """Flip bits of a file, cut it off, blank a part of it, add to it or empty it."""
    content = bytearray(path.read_bytes())
    kind = random.choice(["flip", "flip", "flip", "cut", "blank", "add", "empty"])
    # Half of the damage goes where the structure is.
    end = len(content) if random.random() < 0.5 else min(len(content), 2000)
    if kind == "flip":
        for _ in range(random.choice([1, 1, 8])):
            content[random.randrange(end)] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del content[random.randrange(len(content)) :]
    elif kind == "blank":
        start = random.randrange(end)
        stop = min(len(content), start + random.randrange(1, 500))
        content[start:stop] = bytes(stop - start)
    elif kind == "add":
        content += random.randbytes(random.randrange(1, 100))
    else:
        content.clear()
    path.write_bytes(content)
    return kind


def damage_content(content: bytes, other: bytes, random: Random) -> bytearray:
    """Flip, cut, blank, double or remove a part, or change the header by another file's, a tail or a number."""
    damaged = bytearray(content)
    kind = random.choice(["flip", "flip header", "cut", "zero", "double", "remove", "header", "append", "numbers"])
    start, end = sorted(random.choices(range(len(content)), k=2))
    if kind.startswith("flip"):
        for _ in range(random.choice([1, 1, 2, 10])):
            place = random.randrange(min(len(content), 100) if "header" in kind else len(content))
            damaged[place] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del damaged[start:]
    elif kind == "zero":
        damaged[start:end] = bytes(end - start)
    elif kind == "double":
        damaged[start:start] = content[start:end]
    elif kind == "remove":
        del damaged[start:end]
    elif kind == "header":
        size = random.choice([4, 12, 44, 200])
        damaged[:size] = other[:size]
    elif kind == "append":
        damaged += random.choice([random.randbytes(random.randrange(1, 2_000)), other, bytes(500), b"TAG" + bytes(125)])
    else:  # sizes and counts, most of which are near the beginning
        place, size = random.randrange(min(len(content), 100)), random.choice([2, 4])
        number = random.choice([*_NUMBERS, random.randrange(2**32)]) % 2 ** (8 * size)
        damaged[place : place + size] = number.to_bytes(size, random.choice(["little", "big"]))
    return damaged


def damage_place(path: Path, random: Random) -> str:
    """Remove a file, or put something there that is none."""
    path.unlink()
    kind = random.choice(["removed", "folder", "pipe", "loop", "dangling", "zeros", "full"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "removed":
        path.symlink_to({"loop": path, "dangling": "nowhere", "zeros": "/dev/zero", "full": "/dev/full"}[kind])
    return kind


def damage_json(path: Path, random: Random) -> str:
    """Change, remove, rename or double a value somewhere in a JSON file, or nest it deeply."""
    if random.random() < 0.1:
        opening = random.choice(['{"a":', "["])
        path.write_text(opening * random.choice([100, 900, 100_000]))
        return "nested"
    content = json.loads(path.read_text(encoding="utf-8"))
    what = damage_value(content, random)
    text = json.dumps(content, indent=1)
    if random.random() < 0.1:
        number = random.choice(["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 5000])
        text, what = text.replace(": null", f": {number}", 1), f"{what}, {number}"
    elif random.random() < 0.1 and len(content) > 0:
        key = random.choice(list(content))
        text, what = text[:-2] + f', "{key}": {json.dumps(random.choice(ODD))}}}', f"{what}, double {key}"
    path.write_text(text, encoding="utf-8")
    return what


def damage_value(content: Any, random: Random) -> str:
    """Change one value in nested tables and lists."""
    places = list(_places(content))
    if not places:
        return "nothing"
    owner, key = random.choice(places)
    old = owner[key]
    if isinstance(owner, dict) and random.random() < 0.15:
        del owner[key]
        return f"without {key}"
    if isinstance(owner, dict) and random.random() < 0.1:
        owner[f"{key}_"] = owner.pop(key)
        return f"{key} renamed"
    wrapped = [str(old), [old], {"a": old}]
    owner[key] = random.choice([*ODD, *wrapped, *([old + 1, -old] if isinstance(old, int | float) else [])])
    return f"{key} = {str(owner[key])[:40]}"


def damage_folder(folder: Path, random: Random, own: dict[str, Callable[[Path, Random], str]]) -> str:
    """Damage a folder; `own` has further kinds of damage by the ending of the file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = random.choice(files)
    kinds: list[Callable[[Path, Random], str]] = [damage_bytes, damage_place, _swap(files), _copy]
    kinds += [own[path.suffix]] * 6 if path.suffix in own else []
    return f"{path.relative_to(folder)}: {random.choice(kinds)(path, random)}"


def _swap(files: list[Path]) -> Callable[[Path, Random], str]:
    def swap(path: Path, random: Random) -> str:
        other = random.choice(files)
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
        return f"swapped with {other.name}"

    return swap


def _copy(path: Path, random: Random) -> str:
    other = path.with_name(random.choice(["a", "z"]) + path.name)
    shutil.copy(path, other)
    return f"beside {other.name}"


def _places(content: Any) -> list[tuple[Any, Any]]:
    if isinstance(content, dict):
        keys: Any = list(content)
    elif isinstance(content, list):
        keys = range(len(content))
    else:
        return []
    return [place for key in keys for place in [(content, key), *_places(content[key])]]
