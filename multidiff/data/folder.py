"""A data folder: `metadata.jsonl`, one document a line, and the files it names.

    {"split": "train", "segments": [{"text": "a seven"}, {"image": "img/12.png"}, {"speech": "wav/7-f3.flac"}]}

The key of a segment is the name of a tokenizer, the value whatever that tokenizer's `read` takes. A segment may have a
"label" beside it, which tasks call it by: {"text": "what is it?", "label": "question"}. The order is the order of the
document; one name may stand several times. The file is UTF-8, with or without a byte-order mark.
"""

from __future__ import annotations

import codecs
import json
import mimetypes
import os
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from multidiff import files

LABEL = "label"
SPLITS: tuple[str, ...] = ("train", "validation", "test")
_EXAMPLE = '{"split": "train", "segments": [{"image": "img/12.png"}, {"text": "a seven"}]}'
_OTHER_LAYOUTS = ("metadata.csv", "metadata.parquet")


class Record(NamedTuple):
    """One line of `metadata.jsonl`.

    Attributes:
        line: its number, from 1.
        split: "train", "validation" or "test".
        segments: (tokenizer name, value) in the document's order.
        labels: of the segments; the tokenizer's name where the line gives none.
    """

    line: int
    split: str
    segments: list[tuple[str, Any]]
    labels: list[str]


def read_metadata(folder: Path | str, splits: Collection[str] = SPLITS) -> list[Record]:
    """The documents of a data folder, unread: values stay as written. A line without "split" is for training.

    Raises:
        ValueError: no `metadata.jsonl`, an empty one, or a line that is no document; names file and line.
    """
    folder = Path(folder)
    return parse_metadata(metadata_bytes(folder), folder / "metadata.jsonl", splits)


def metadata_bytes(folder: Path) -> bytes:
    """The content of a folder's `metadata.jsonl`.

    Raises:
        ValueError: it is missing or cannot be read; says how to convert another layout.
    """
    path = folder / "metadata.jsonl"
    if not path.exists():
        for name in _OTHER_LAYOUTS:
            if (folder / name).is_file():
                raise ValueError(
                    f"{path} does not exist, but {name} does. Write each of its rows as a line of metadata.jsonl, "
                    f"with the names of your tokenizers as keys: {_EXAMPLE}"
                )
        raise ValueError(f"{path} does not exist: a data folder holds a metadata.jsonl with one document a line")
    return files.read_bytes(path)


def parse_metadata(content: bytes, path: Path, splits: Collection[str] = SPLITS) -> list[Record]:
    """`read_metadata` of the content of the file `path`."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path}, line 1: the file is UTF-16 text; save it as UTF-8")
    records = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if line.strip():
            record = _parse(line, number, path)
            if record.split in splits:
                records.append(record)
    if not records:
        raise ValueError(f"{path} has no documents in split {' or '.join(splits)}.")
    return records


def file_states(folder: Path | str, values: Iterable[Any]) -> dict[str, tuple[int, int]]:
    """Bytes of each file that a value names, and when it was last written, in ns. Values that name none are left out.

    Reads what the file system says of a name once, however many values repeat it.
    """
    states = {}
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        for value in dict.fromkeys(value for value in values if isinstance(value, str)):
            try:  # some texts are longer than the system takes for a name
                status = os.stat(value, dir_fd=descriptor)
            except (OSError, ValueError):
                continue
            if stat.S_ISREG(status.st_mode):
                states[value] = status.st_size, status.st_mtime_ns
    finally:
        os.close(descriptor)
    return states


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, each key once: JSON itself would keep the last of several without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_refuse)


def _parse(line: bytes, number: int, path: Path) -> Record:
    try:
        row = _DECODER.decode(line.decode())
    except RecursionError:
        raise ValueError(f"{path}, line {number}: nested too deeply to be a document") from None
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {_fault(line, error)}") from None
    where = f"{path}, line {number}"
    if isinstance(row, dict) and "segments" not in row and any(key.endswith("file_name") for key in row):
        raise ValueError(f"{where}: the layout with file_name is not read. Write the line as {_as_document(row)}")
    if not isinstance(row, dict) or not isinstance(row.get("segments"), list) or not row["segments"]:
        raise ValueError(f'{where}: expected {{"split": …, "segments": [{{"text": …}}, …]}}')
    if unknown := set(row) - {"split", "segments"}:
        raise ValueError(f"{where}: unknown key {', '.join(map(repr, sorted(unknown)))}; known: 'split', 'segments'")
    split = row.get("split", "train")
    if split not in SPLITS:
        raise ValueError(f"{where}: split {split!r} is none of {', '.join(SPLITS)}")
    segments, labels = [], []
    for index, segment in enumerate(row["segments"]):
        named = {key: value for key, value in segment.items() if key != LABEL} if isinstance(segment, dict) else {}
        if len(named) != 1:
            raise ValueError(f'{where}, segment {index}: expected one tokenizer name and its value, {{"text": "…"}}')
        label = segment.get(LABEL, next(iter(named)))
        if not isinstance(label, str) or not label or label == "others":
            raise ValueError(f"{where}, segment {index}: a label must be a word other than 'others', got {label!r}")
        segments += named.items()
        labels.append(label)
    return Record(number, split, segments, labels)


def _fault(line: bytes, error: ValueError) -> str:
    """What is wrong with a line that could not be decoded."""
    if b"\0" in line:
        return "the line holds NUL bytes, so it is not UTF-8 text or is damaged; save the file as UTF-8"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text ({error.reason} at byte {error.start + 1}); save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    return f"not JSON ({error})"


def _as_document(row: dict[str, Any]) -> str:
    """The line that says what a row of Hugging Face's layout says, with guessed names of tokenizers."""
    segments = []
    for key, value in row.items():
        if isinstance(value, str) and key != "split":
            kind = (mimetypes.guess_type(value)[0] or "text").split("/")[0]
            segments.append({kind: value if len(value) <= 60 else f"{value[:60]}…"})
    document = {"split": row.get("split", "train"), "segments": segments}
    return f"{json.dumps(document, ensure_ascii=False)}, with the names of your tokenizers as keys"
