"""A data folder: `metadata.jsonl`, one document a line, and the files it names.

    {"split": "train", "segments": [{"text": "a seven"}, {"image": "img/12.png"}, {"speech": "wav/7-f3.flac"}]}

The key of a segment is the name of a tokenizer, the value whatever that tokenizer's `read` takes. A segment may have a
"label" beside it, which tasks call it by: {"text": "what is it?", "label": "question"}. The order is the order of the
document; one name may stand several times. The file is UTF-8, with or without a byte-order mark.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import mimetypes
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from multidiff import files
from multidiff.data.sources.source import SPLITS, Record, Source
from multidiff.tokenizer import ModalityTokenizer

LABEL = "label"
_EXAMPLE = '{"split": "train", "segments": [{"image": "img/12.png"}, {"text": "a seven"}]}'
_OTHER_LAYOUTS = ("metadata.csv", "metadata.parquet")
_LINES_PER_PART = 65_536
_BYTES_PER_PART = 2**25


class _Part(NamedTuple):
    """A range of whole lines: where it begins and ends in the file, and the number of its first line."""

    start: int
    stop: int
    line: int


class Folder(Source):
    """The documents of a data folder, a part for every 65,536 lines of `metadata.jsonl`.

    Args:
        folder: holds `metadata.jsonl`; the names of files in it are relative to the folder.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.path = self.folder / "metadata.jsonl"
        self._parts: list[_Part] | None = None

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def cache(self) -> Path:
        return self.folder / ".tokenized"

    @property
    def home(self) -> Path:
        return self.folder.resolve()

    def fingerprint(self) -> str:
        digest, self._parts = self._index()
        return digest

    def check(self, tokenizers: Collection[str]) -> None:
        records = 0
        for part in range(self.parts()):
            for record in self.read(part):
                records += 1
                for name, _ in record.segments:
                    if name not in tokenizers:
                        raise ValueError(
                            f"{self.where(part, record.line)}: no tokenizer is called {name!r}; the configuration has "
                            f"{', '.join(tokenizers)}"
                        )
        if not records:
            raise ValueError(f"{self.path} has no documents.")

    def parts(self) -> int:
        return len(self._ranges())

    def read(self, part: int) -> Iterator[Record]:
        start, stop, first = self._ranges()[part]
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                content = file.read(stop - start)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read ({error.strerror})") from error
        content = content if start else content.removeprefix(codecs.BOM_UTF8)
        for number, line in enumerate(content.splitlines(), start=first):
            if line.strip():
                yield _parse(line, number, self.path)

    def where(self, part: int, line: int) -> str:
        return f"{self.path}, line {line}"

    def item(self, tokenizer: ModalityTokenizer, value: Any) -> Any:
        return tokenizer.read(value, self.folder)

    def advice(self, split: str) -> str:
        return f'Set "split": "{split}" on at least one line.'

    def states(self, values: Iterable[Any]) -> dict[str, tuple[int, int]]:
        return file_states(self.folder, values)

    def _ranges(self) -> list[_Part]:
        if self._parts is None:
            self._parts = self._index()[1]
        return self._parts

    def _index(self) -> tuple[str, list[_Part]]:
        """SHA-256 of the file, and its parts."""
        _check_layout(self.path)
        digest, parts = hashlib.sha256(), []
        start = offset = lines = 0
        first = line = 1
        try:
            with self.path.open("rb") as file:
                for raw in file:
                    if not offset and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise ValueError(f"{self.path}, line 1: the file is UTF-16 text; save it as UTF-8")
                    digest.update(raw)
                    offset, line, lines = offset + len(raw), line + len(raw.splitlines()), lines + 1
                    if lines == _LINES_PER_PART or offset - start >= _BYTES_PER_PART:
                        parts.append(_Part(start, offset, first))
                        start, first, lines = offset, line, 0
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read ({error.strerror})") from error
        if offset > start:
            parts.append(_Part(start, offset, first))
        return digest.hexdigest(), parts


def read_metadata(folder: Path | str, splits: Collection[str] = SPLITS) -> list[Record]:
    """The documents of a data folder, unread: values stay as written. A line without "split" is for training.

    Raises:
        ValueError: no `metadata.jsonl`, an empty one, or a line that is no document; names file and line.
    """
    source = Folder(folder)
    records = [record for part in range(source.parts()) for record in source.read(part) if record.split in splits]
    if not records:
        raise ValueError(f"{source.path} has no documents in split {' or '.join(splits)}.")
    return records


def _check_layout(path: Path) -> None:
    """Refuse a folder without `metadata.jsonl`; say how to convert another layout."""
    if not path.exists():
        for name in _OTHER_LAYOUTS:
            if (path.parent / name).is_file():
                raise ValueError(
                    f"{path} does not exist, but {name} does. Use multidiff.data.Table as the source, or write each of "
                    f"its rows as a line of metadata.jsonl, with the names of your tokenizers as keys: {_EXAMPLE}"
                )
        raise ValueError(f"{path} does not exist: a data folder holds a metadata.jsonl with one document a line")
    files.check_file(path)


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
        raise ValueError(
            f"{where}: the layout with file_name is read by multidiff.data.Table (path imagefolder or audiofolder). "
            f"Use it as the source, or write the line as {_as_document(row)}"
        )
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
