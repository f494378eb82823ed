"""Shards: the codes of some thousand documents in one Arrow file, and the folder of all shards of a source.

    shards.json                       what the folder holds, written last
    00012-003.json                    one window of the source's part 12: its shards, what was left out, its files
    train/00012-003.arrow             the documents of that window in a split

Arrow trusts what it maps: a flipped bit changes codes without a word, or ends Python. So a shard is verified when a
process opens it: 1.8 GB a second on one core of an AMD EPYC, whose instructions know SHA-256.

Shape suffixes: D documents of a shard, S their segments, C their codes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from multidiff import files
from multidiff.sequence.seen import Orders

_INDEX = "shards.json"
_KINDS = b"kinds"


class Kind(NamedTuple):
    """What segments of a shard have in common: most of them share few of these.

    Attributes:
        name: of the tokenizer.
        label: what tasks call the segment.
        size: of the item, as JSON.
        codes: how many the segment has.
    """

    name: str
    label: str
    size: str
    codes: int


class Row(NamedTuple):
    """A document, as a shard takes it.

    Attributes:
        line: where it stands in its part of the source.
        kinds: of its segments.
        ids: local ids of its segments, int32.
    """

    line: int
    kinds: list[Kind]
    ids: list[np.ndarray]


class ShardInfo(NamedTuple):
    """What is known of a shard without opening it.

    Attributes:
        file: its path within the folder.
        size: bytes.
        sha256: of its content.
        part: of the source that its documents come from.
        documents: how many there are.
        longest: tokens of the longest one.
    """

    file: str
    size: int
    sha256: str
    part: int
    documents: int
    longest: int


@dataclass
class Counts:
    """How often each order, size and label occurs in a split, and how many documents were left out.

    Attributes:
        orders: documents by the names of their tokenizers, in order.
        sizes: items by size (JSON), by tokenizer.
        labels: segments by label.
        left_out: documents that could not be read.
    """

    orders: Orders = field(default_factory=Counter)
    sizes: dict[str, Counter[str]] = field(default_factory=dict)
    labels: Counter[str] = field(default_factory=Counter)
    left_out: int = 0

    @property
    def documents(self) -> int:
        return self.orders.total()

    def add(self, kinds: Sequence[Kind], times: int = 1) -> None:
        """Count a document with segments of these kinds; `times` may be negative."""
        self.orders[tuple(kind.name for kind in kinds)] += times
        for kind in kinds:
            self.labels[kind.label] += times
            self.sizes.setdefault(kind.name, Counter())[kind.size] += times

    def merge(self, other: Counts) -> None:
        """Add the counts of other documents."""
        self.orders.update(other.orders)
        self.labels.update(other.labels)
        for name, sizes in other.sizes.items():
            self.sizes.setdefault(name, Counter()).update(sizes)
        self.left_out += other.left_out

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes back, for JSON."""
        orders = [[*names, number] for names, number in self.orders.items()]
        return {"orders": orders, "sizes": self.sizes, "labels": self.labels, "left_out": self.left_out}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Counts:
        """Counts from what `to_dict` returned."""
        orders = Counter({tuple(names): number for *names, number in content["orders"]})
        sizes = {name: Counter(of_name) for name, of_name in content["sizes"].items()}
        return cls(orders, sizes, Counter(content["labels"]), content["left_out"])


def write_shard(folder: Path, file: str, part: int, rows: Sequence[Row]) -> ShardInfo:
    """Write documents as a shard, as a whole or not at all.

    Args:
        folder: of the shards.
        file: the path of the shard within it.
        part: of the source.
        rows: at least one document.

    Raises:
        ValueError: the file cannot be written; names it.
    """
    numbers: dict[Kind, int] = {}
    kind_S = [numbers.setdefault(kind, len(numbers)) for row in rows for kind in row.kinds]
    ids_C = np.concatenate([ids for row in rows for ids in row.ids], dtype=np.int32)
    columns = {
        "line": pa.array([row.line for row in rows], pa.int64()),
        "kinds": _lists([len(row.kinds) for row in rows], np.array(kind_S, np.int32)),
        "ids": _lists([sum(map(len, row.ids)) for row in rows], ids_C),
    }
    batch = pa.RecordBatch.from_pydict(columns, metadata={_KINDS: json.dumps(list(numbers)).encode()})
    path = folder / file
    with files.whole_file(path) as beside, files.naming(path):
        with pa.ipc.new_file(str(beside), batch.schema) as writer:
            writer.write_batch(batch)
        content = beside.read_bytes()
    longest = max(1 + sum(kind.codes + 2 for kind in row.kinds) for row in rows)
    return ShardInfo(file, len(content), hashlib.sha256(content).hexdigest(), part, len(rows), longest)


class Shard:
    """A shard, mapped into memory.

    Args:
        folder: of the shards.
        info: what is known of it.

    Attributes:
        kinds: of its segments, each once.
        line_D: int64, where each document stands in its part of the source.
        length_D: int64, tokens of each document: `<bos>`, two structure tokens a segment, and its codes.

    Raises:
        ValueError: the file is missing or damaged; names it.
    """

    def __init__(self, folder: Path, info: ShardInfo):
        path = folder / info.file
        files.check_file(path)
        with pa.memory_map(str(path)) as mapped:
            if mapped.size() != info.size or hashlib.sha256(mapped.read_buffer()).hexdigest() != info.sha256:
                raise ValueError(f"{path} is damaged: its checksum differs. Delete it; the next start makes it again.")
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        self.kinds = [Kind(*kind) for kind in json.loads(batch.schema.metadata[_KINDS])]
        line, kinds, ids = batch.columns
        self.line_D = line.to_numpy()
        self._segment_D, self._kind_S = kinds.offsets.to_numpy(), kinds.values.to_numpy()
        self._code_D, self._ids_C = ids.offsets.to_numpy(), ids.values.to_numpy()

    @cached_property
    def length_D(self) -> np.ndarray:
        return 1 + np.diff(self._code_D) + 2 * np.diff(self._segment_D)

    def kinds_of(self, row: int) -> list[Kind]:
        """The kinds of a document's segments."""
        return [self.kinds[kind] for kind in self._kind_S[self._segment_D[row] : self._segment_D[row + 1]]]

    def document(self, row: int) -> list[tuple[Kind, np.ndarray]]:
        """The segments of a document: their kinds and local ids, int32."""
        found, start = [], self._code_D[row]
        for kind in self.kinds_of(row):
            found.append((kind, self._ids_C[start : start + kind.codes]))
            start += kind.codes
        return found


@dataclass(frozen=True)
class ShardFolder:
    """All shards of a source.

    Attributes:
        path: the folder.
        shards: of each split.
        counts: of each split.
    """

    path: Path
    shards: dict[str, list[ShardInfo]]
    counts: dict[str, Counts]

    def save(self) -> None:
        """Write what the folder holds, when it is complete."""
        content = {
            "folder": self.path.name,
            "shards": self.shards,
            "counts": {split: counts.to_dict() for split, counts in self.counts.items()},
        }
        files.write_json(self.path / _INDEX, {"sha256": _digest(content), "content": content})

    @classmethod
    def load(cls, path: Path) -> ShardFolder:
        """The shards of a folder, none of which is opened.

        Raises:
            ValueError: the folder is incomplete or damaged, or a shard is missing or has another size; names the file.
        """
        index = path / _INDEX
        found = files.read_json(index)
        content = found.get("content")
        if found.get("sha256") != _digest(content) or not isinstance(content, dict):
            raise ValueError(f"{index} is damaged: its checksum differs")
        if content["folder"] != path.name:
            raise ValueError(f"{index} belongs to the folder {content['folder']}")
        shards = {split: [ShardInfo(*info) for info in infos] for split, infos in content["shards"].items()}
        for info in (info for infos in shards.values() for info in infos):
            files.check_file(path / info.file)
            if (path / info.file).stat().st_size != info.size:
                raise ValueError(f"{path / info.file} is damaged: its size differs")
        return cls(path, shards, {split: Counts.from_dict(counts) for split, counts in content["counts"].items()})


def _lists(lengths: Sequence[int], values: np.ndarray) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values, pa.int32()))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
