"""Reads training texts from local files, one after another. The corpus need not fit in memory."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from multidiff.data.sources.folder import read_metadata
from multidiff_bpe.bpe import valid


def read_texts(path: Path, key: str) -> Iterator[str]:
    """The texts at `path`, in order.

    | path | a text is |
    |---|---|
    | a folder with `metadata.jsonl` | a `key` segment of the train split |
    | a folder that `save_to_disk` of Hugging Face's `datasets` wrote | a row's `key`; of splits, `train` |
    | `.parquet` | a row's `key` |
    | `.jsonl` | the `key` of a line's object |
    | any other file | a line of UTF-8, its line break included |

    Raises:
        ValueError: `key` is missing or is not text, or the file is damaged; the message names the file and the place.
        OSError: the file is missing or cannot be read.
    """
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
        return _from_dataset(path, key) if saved else _from_data_folder(path, key)
    return {".parquet": _from_parquet, ".jsonl": _from_json_lines}.get(path.suffix, _lines)(path, key)


def _from_data_folder(path: Path, key: str) -> Iterator[str]:
    if not (path / "metadata.jsonl").is_file():
        raise ValueError(
            f"{path} is neither a data folder (it has no metadata.jsonl) nor a dataset saved by `save_to_disk`. Give "
            "the files in it."
        )
    names = set()
    for record in read_metadata(path, ["train"]):
        for name, value in record.segments:
            names.add(name)
            if name == key:
                yield _text(value, key, f"{path / 'metadata.jsonl'}, line {record.line}")
    if key not in names:
        raise ValueError(f"The train split of {path} has no {key!r}. Choose a --key from {', '.join(sorted(names))}.")


def _from_dataset(path: Path, key: str) -> Iterator[str]:
    folder = path / "train" if (path / "dataset_dict.json").is_file() else path
    if not folder.is_dir():
        raise ValueError(f"{path} has no train split. Give the folder of one of its splits.")
    try:
        dataset = Dataset.load_from_disk(str(folder))
    except Exception as error:  # of JSON, of Arrow, and of the library
        raise ValueError(f"{folder} is damaged: {error}") from None
    _expect_column(path, key, dataset.column_names)
    yield from _column(dataset[key], path, key)


def _from_parquet(path: Path, key: str) -> Iterator[str]:
    path.open("rb").close()  # raises Python's error if the file is missing
    # Without streaming, the library copies the file into a cache. It also treats the path as a pattern.
    try:
        rows = load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
    except Exception as error:  # of Arrow, and of the library
        raise ValueError(f"{path} is damaged or not a Parquet file: {error}") from None
    _expect_column(path, key, rows.column_names)

    def values() -> Iterator[Any]:
        try:
            for row in rows.select_columns(key):
                yield row[key]
        except Exception as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    yield from _column(values(), path, key)


def _from_json_lines(path: Path, key: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path, key), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict):
            raise ValueError(f'{where}: expected an object, {{"{key}": "…"}}')
        _expect_column(where, key, row)
        yield _text(row[key], key, where)


def _lines(path: Path, key: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _column(values: Iterable[Any], path: Path, key: str) -> Iterator[str]:
    for row, value in enumerate(values):
        yield _text(value, key, f"{path}, row {row}")


def _expect_column(where: Path | str, key: str, names: Any) -> None:
    if key not in names:
        raise ValueError(f"{where} has no {key!r}. Choose a --key from {', '.join(sorted(names))}.")


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} must be a string, not {value!r}")
    try:
        return valid(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
