"""Checks of files: items that are written, read and previewed, and tokenizers that are saved and loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from multidiff.testing.comparison import error_of, expect, same, same_places, short
from multidiff.testing.isolation import untouched_random_state
from multidiff.tokenizer import ItemError, ModalityTokenizer

# The files that a saved tokenizer may consist of. Reading one of these runs no code.
SAVED_SUFFIXES = {".json", ".safetensors", ".txt", ".md", ".yaml"}


def check_files(tokenizer: ModalityTokenizer, items: list[Any], folder: Path) -> list[Path]:
    """Check that items come back from the files they are written to. Returns these files."""
    codes, written = tokenizer.encode(items), []
    for number, (item, one) in enumerate(zip(items, codes, strict=True)):
        check_preview(tokenizer, item)
        path = write(tokenizer, item, folder / f"item.{number}")
        written.append(path)
        with untouched_random_state("read()"):
            back = tokenizer.read(_value(path), folder)
        (again,) = tokenizer.encode([back])
        expect(
            same_places(one, again) and one.size == again.size,
            f"read() must bring back what write() wrote: {one.size} became {again.size} ({short(item)})",
        )
        if path.suffix == ".txt":  # read() gets the text itself, so no file can be missing or damaged
            continue
        (folder / f"damaged{path.suffix}").write_bytes(b"\xff\xfe\x00 not what the suffix says")
        for name in (f"missing{path.suffix}", f"damaged{path.suffix}"):
            error = error_of(lambda name=name: tokenizer.read(name, folder))
            expect(
                isinstance(error, ItemError) and name in str(error),
                f"read() of a missing or damaged file must raise ItemError naming {name!r}, not {error!r}",
            )
    return written


def check_saving(tokenizer: ModalityTokenizer, items: list[Any], folder: Path) -> list[Path]:
    """Check that a saved tokenizer loads as it was, and that a damaged one is refused. Returns the saved files."""
    codes, fingerprint = tokenizer.encode(items), tokenizer.fingerprint
    saved, empty, broken = folder / "tokenizer", folder / "empty", folder / "broken"
    saved.mkdir(parents=True)
    empty.mkdir()
    tokenizer.save(saved)
    files = sorted(file for file in saved.rglob("*") if file.is_file())
    expect(files, "save() must write a file; otherwise load() cannot tell a saved tokenizer from an empty folder")
    for file in files:
        expect(
            file.suffix in SAVED_SUFFIXES,
            f"save() wrote {file.name!r}; write only {', '.join(sorted(SAVED_SUFFIXES))}, which cannot contain code",
        )
    loaded = type(tokenizer).load(saved)
    expect(type(loaded) is type(tokenizer), f"load() must return a {type(tokenizer).__name__}, not {loaded!r}")
    expect(loaded.codebook_sizes == tokenizer.codebook_sizes, "codebook_sizes must survive save() and load()")
    expect(loaded.fingerprint == fingerprint, "fingerprint must survive use, save() and load()")
    expect(same(codes, loaded.encode(items)), "a loaded tokenizer must give the same codes as the saved one")
    error = error_of(lambda: type(tokenizer).load(empty))
    expect(
        isinstance(error, ValueError) and str(empty) in str(error),
        f"load() of an empty folder must raise ValueError naming the folder, not {error!r}",
    )
    for file in files:
        if file.suffix not in {".json", ".safetensors"} or file.stat().st_size < 2:
            continue
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(saved, broken)
        content, victim = file.read_bytes(), broken / file.relative_to(saved)
        for what in ("truncated", "missing"):
            victim.write_bytes(content[: len(content) // 2])
            if what == "missing":
                victim.unlink()
            error = error_of(lambda: type(tokenizer).load(broken))
            expect(
                isinstance(error, ValueError) and file.name in str(error),
                f"load() with {file.name} {what} must raise ValueError naming the file, not {error!r}",
            )
    return files


def check_preview(tokenizer: ModalityTokenizer, item: Any) -> None:
    """Check that an item has a picture."""
    with untouched_random_state("preview()"):
        picture = tokenizer.preview(item)
    expect(
        isinstance(picture, Image.Image) and min(picture.size) > 0,
        f"preview() must return a PIL image that is not empty, not {picture!r} ({short(item)})",
    )


def write(tokenizer: ModalityTokenizer, item: Any, stem: Path) -> Path:
    """Write an item and check that exactly one new file holds it."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    before = set(stem.parent.iterdir())
    with untouched_random_state("write()"):
        path = tokenizer.write(item, stem)
    expect(isinstance(path, Path) and path.is_file(), f"write() must return the path of the file, not {path!r}")
    expect(
        path.parent == stem.parent and path.name == stem.name + path.suffix and path.suffix,
        f"write(item, {stem.name!r}) must write {stem.name!r} plus a suffix in the same folder, not {path}",
    )
    extra = set(stem.parent.iterdir()) - before - {path}
    expect(not extra, f"write() left other files behind: {sorted(file.name for file in extra)}")
    return path


def _value(path: Path) -> str:
    """The value of a written item in `metadata.jsonl`: the words of a text file, or the name of any other file."""
    return path.read_bytes().decode() if path.suffix == ".txt" else path.name
