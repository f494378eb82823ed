"""Damaged shards: they are found and made again, or an error names their folder; codes never change."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random

from multidiff.data import DocumentDataModule

_TOKENIZERS = {"text": {"plugin": "bpe", "preset": "bytes"}, "title": {"plugin": "bpe", "preset": "bytes"}}

_KINDS = (
    *("flip", "flip", "flip", "cut", "empty", "zero", "remove", "insert", "delete", "swap", "swap folders", "extra"),
    *("foreign file", "foreign folder", "no folder", "folder", "pipe", "link", "edit index", "file"),
)


def prepare(folder: Path, random: Random) -> dict:
    """A data folder of two splits with its shards, and the codes in them."""
    data = folder / "data"
    data.mkdir(parents=True)
    rows = []
    for number in range(24):
        words = " ".join(random.choices(["red", "blue", "fox", "dog", "runs", "七"], k=random.randrange(1, 9)))
        segments = [{"text": words}, {"title": f"title {number}"}]
        rows.append(json.dumps({"split": "train" if number % 3 else "validation", "segments": segments}))
    (data / "metadata.jsonl").write_text("\n".join(rows))
    codes = _codes(data)
    (place,) = (data / ".tokenized").iterdir()
    other = shutil.copytree(data, folder / "other")
    with (other / "metadata.jsonl").open("a") as file:
        file.write('\n{"segments": [{"text": "one more"}]}')
    shutil.rmtree(other / ".tokenized")
    _codes(other)
    (foreign,) = (other / ".tokenized").iterdir()
    return {"data": data, "place": place.name, "foreign": foreign, "codes": codes}


def attempt(state: dict, number: int, random: Random) -> str:
    """Damage the shards and read them."""
    folder = shutil.copytree(state["data"], state["data"].with_name(f"data-{number}"))
    place = folder / ".tokenized" / state["place"]
    try:
        kind = _damage(place, state["foreign"], random)
        try:
            codes = _after_advice(folder)
        except ValueError as error:
            if str(place) not in str(error) or "\n" in str(error):
                raise AssertionError(f"{kind}: no sentence that names the folder: {error}") from error
            return f"refused ({kind})"
        assert codes == state["codes"], f"{kind}: other codes"
        left = sorted(path.name for path in place.parent.iterdir())
        assert left == [place.name], f"{kind}: left behind {left}"
        return f"read ({kind})"
    finally:
        shutil.rmtree(folder)


def _after_advice(folder: Path):
    """The codes, after every damaged shard that an error names is deleted, as it advises."""
    while True:
        try:
            return _codes(folder)
        except ValueError as error:
            path, _, rest = str(error).partition(" is damaged")
            if "Delete it" not in rest:
                raise
            Path(path).unlink()


def _codes(folder: Path) -> list[list[tuple[str, list[int], dict[str, int]]]]:
    data = DocumentDataModule(str(folder), _TOKENIZERS)
    data.prepare_data()
    data.setup("fit")
    splits = [data.documents(split) for split in ("train", "validation")]
    return [
        [(name, codes.ids_N.tolist(), codes.size) for name, codes in documents.codes(index)]
        for documents in splits
        for index in range(len(documents))
    ]


def _damage(place: Path, foreign: Path, random: Random) -> str:
    """Damage something in the folder of shards; returns what kind of damage that was."""
    paths = sorted(path for path in place.rglob("*") if path.is_file())
    path, other = random.sample(paths, 2)
    content = bytearray(path.read_bytes())
    start, end = sorted(random.choices(range(len(content) + 1), k=2))
    kind = random.choice(_KINDS)
    if kind == "flip":
        for _ in range(random.choice([1, 1, 10])):
            if content:
                content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del content[start:]
    elif kind == "empty":
        content.clear()
    elif kind == "zero":
        content[start:end] = bytes(end - start)
    elif kind == "remove":
        del content[start:end]
    elif kind == "insert":
        content[start:start] = random.randbytes(random.randrange(1, 100))
    elif kind == "edit index":
        path = place / "shards.json"
        old, new = random.choice(
            [(b'"left_out": 0', b'"left_out": 1'), (b'"train/', b'"trian/'), (b"00000-", b"../0-")]
        )
        content = path.read_bytes().replace(old, new)
    if kind == "delete":
        path.unlink()
    elif kind == "swap":
        _swap(path, other)
    elif kind == "swap folders":
        _swap(place / "train", place / "validation")
    elif kind == "extra":
        shutil.copyfile(place / "validation" / "00000-000.arrow", place / "train" / "00000-001.arrow")
        (place / "00001-000.json").write_bytes(b"other")
    elif kind == "foreign file":
        shutil.copyfile(foreign / "train" / "00000-000.arrow", path) if path.suffix == ".arrow" else path.unlink()
    elif kind == "foreign folder":
        shutil.rmtree(place)
        shutil.copytree(foreign, place)
    elif kind == "no folder":
        shutil.rmtree(random.choice([place, place / "train"]))
    elif kind in ("folder", "pipe", "link"):
        path.unlink()
        {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to(path)}[kind]()
    elif kind == "file":
        shutil.rmtree(place)
        place.write_bytes(b"a file")
    else:
        path.write_bytes(content)
    return kind


def _swap(one: Path, two: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
