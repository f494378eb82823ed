"""A data folder: `metadata.jsonl`, one document a line, and the files it names.

    {"split": "train", "segments": [{"text": "a seven"}, {"image": "img/12.png"}, {"speech": "wav/7-f3.flac"}]}

The keys of a segment are tokenizer names, the values whatever that tokenizer's `read` takes. The order is the order
of the document; one name may stand several times.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPLITS: tuple[str, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Record:
    """One line of `metadata.jsonl`.

    Attributes:
        line: its number, from 1.
        split: "train", "validation" or "test".
        segments: (tokenizer name, value) in the document's order.
    """

    line: int
    split: str
    segments: list[tuple[str, Any]]


def read_metadata(folder: Path | str, splits: Collection[str] = SPLITS) -> list[Record]:
    """The documents of a data folder, unread: values stay as written. A line without "split" is for training.

    Raises:
        ValueError: no `metadata.jsonl`, an empty one, or a line that is no document; names file and line.
    """
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: a data folder holds a metadata.jsonl with one document a line")
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                record = _parse(line, number, path)
                if record.split in splits:
                    records.append(record)
    if not records:
        raise ValueError(f"{path} holds no document of split {' or '.join(splits)}")
    return records


def file_state(folder: Path | str, value: Any) -> tuple[int, int]:
    """Bytes of the file that a segment names, and when it was last written, in ns; (0, 0) where it names none."""
    try:  # some texts are longer than the system takes for a name
        status = (Path(folder) / value).stat() if isinstance(value, str) else None
    except (OSError, ValueError):
        status = None
    return (status.st_size, status.st_mtime_ns) if status and stat.S_ISREG(status.st_mode) else (0, 0)


def _parse(line: str, number: int, path: Path) -> Record:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict) or not isinstance(row.get("segments"), list) or not row["segments"]:
        raise ValueError(f'{where}: expected {{"split": …, "segments": [{{"text": …}}, …]}}')
    if unknown := set(row) - {"split", "segments"}:
        raise ValueError(f"{where}: unknown key {', '.join(map(repr, sorted(unknown)))}; known: 'split', 'segments'")
    split = row.get("split", "train")
    if split not in SPLITS:
        raise ValueError(f"{where}: split {split!r} is none of {', '.join(SPLITS)}")
    segments = []
    for index, segment in enumerate(row["segments"]):
        if not isinstance(segment, dict) or len(segment) != 1:
            raise ValueError(f'{where}, segment {index}: expected one tokenizer name and its value, {{"text": "…"}}')
        segments.append(next(iter(segment.items())))
    return Record(number, split, segments)
