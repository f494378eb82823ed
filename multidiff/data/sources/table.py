"""Tables: whatever Hugging Face's `datasets` reads, row by row, as documents by a template."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from multidiff import files
from multidiff.data.sources.folder import file_states
from multidiff.data.sources.source import SPLITS, Record, Source
from multidiff.data.sources.template import Template
from multidiff.tokenizer import ItemError, ModalityTokenizer

_MOST_CHECKED = 32  # parts whose columns are looked at before anything is tokenized


class _Part(NamedTuple):
    """A piece of a table: our split, its number in it, and the piece."""

    split: str
    number: int
    table: Any


class Table(Source):
    """Rows of CSV, JSON Lines, Parquet or Arrow files, of WebDataset archives, of folders of pictures or sounds, or of
    a data set of the Hugging Face hub, as documents by a template.

    Args:
        path: what `datasets.load_dataset` takes: "csv", "json", "parquet", "arrow", "text", "webdataset", "imagefolder"
            or "audiofolder"; a folder of such files, or one that `save_to_disk` wrote; a name on the hub.
        template: the segments of a document, see `multidiff.data.sources.template`.
        data_files: files or patterns, a list of them, or those of each split. They may be addresses such as s3://….
        data_dir: the folder of an "imagefolder" or "audiofolder", or a folder within the data set.
        name: the configuration of a data set on the hub.
        splits: our split -> the table's, where the names differ: {validation: dev}.
        folder: what names of files in columns are relative to; None is the folder of the table.
        cache: where codes are kept; None is `.tokenized` in the folder of the table, which must then be a local one.
        options: other arguments of `datasets.load_dataset_builder`: revision, token, storage_options, and what the
            format takes, such as sep of CSV.

    Raises:
        ValueError: a template or a split that is none.
    """

    def __init__(
        self,
        path: str,
        template: list[dict[str, Any]],
        data_files: str | list[str] | dict[str, str | list[str]] | None = None,
        data_dir: str | None = None,
        name: str | None = None,
        splits: dict[str, str] | None = None,
        folder: str | None = None,
        cache: str | None = None,
        options: dict[str, Any] | None = None,
    ):
        self.path, self.data_files, self.data_dir, self.config = path, data_files, data_dir, name
        self.template, self._rows = Template.of(template), template
        self.splits = splits or {}
        for split in self.splits:
            if split not in SPLITS:
                raise ValueError(f"splits: {split!r} is none of {', '.join(SPLITS)}")
        for split in data_files if isinstance(data_files, dict) else ():
            if split not in {*SPLITS, *self.splits.values()}:
                raise ValueError(
                    f"data_files: {split!r} is none of {', '.join(SPLITS)}. Say what it is for, as in "
                    f"splits: {{validation: {split}}}."
                )
        self.options = options or {}
        self.folder = Path(folder) if folder else self._home()
        self._cache = cache
        self._made: list[_Part] | None = None

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.path, self.config, self.data_dir or self._first())))

    @property
    def cache(self) -> Path:
        if self._cache:
            return Path(self._cache)
        if self.folder is None:
            raise ValueError(f"{self.name}: say where codes are kept. Set cache of the source to a folder.")
        return self.folder / ".tokenized"

    @property
    def home(self) -> Path | None:
        return self.folder.resolve() if self.folder else None

    def fingerprint(self) -> str:
        self._made = None
        tables, builder = self._open()
        facts = {
            "table": builder,
            "template": self._rows,
            "splits": self.splits,
            "config": self.config,
            "home": str(self.home) if self._cache else None,
        }
        return hashlib.sha256(json.dumps([facts, sorted(tables)], sort_keys=True, default=str).encode()).hexdigest()

    def check(self, tokenizers: Collection[str]) -> None:
        parts, rows = self._parts(), 0
        for part in range(0, len(parts), max(1, -(-len(parts) // _MOST_CHECKED))):
            with closing(self._iterate(part)) as found:
                row = next(found, None)
            if row is not None:
                rows += 1
                self.template.check(list(row), tokenizers, self._part_name(part))
        if not rows:
            have = "Its tables are empty." if parts else f"It has {', '.join(map(repr, self._open()[0]))}; see splits."
            raise ValueError(f"{self.name} has no rows in the splits {', '.join(SPLITS)}. {have}")

    def parts(self) -> int:
        return len(self._parts())

    def read(self, part: int) -> Iterator[Record]:
        split = self._parts()[part].split
        for number, row in enumerate(self._iterate(part), start=1):
            try:
                documents = self.template.documents(row)
            except ValueError as error:
                raise ValueError(f"{self.where(part, number)}: {error}") from None
            for document in documents:
                segments = [(name, value) for name, value, _ in document]
                yield Record(number, split, segments, [label for *_, label in document])

    def where(self, part: int, line: int) -> str:
        return f"{self._part_name(part)}, row {line}"

    def item(self, tokenizer: ModalityTokenizer, value: Any) -> Any:
        """Bytes, and files elsewhere, are put into a temporary file for the tokenizer to read."""
        folder = self.folder or Path()
        if isinstance(value, str) and tokenizer.modality != "text":
            value = {"bytes": None, "path": value}
        if not isinstance(value, Mapping) or not value.keys() >= {"bytes", "path"}:
            return tokenizer.read(value, folder)
        content, path = value["bytes"], value["path"]
        if content is None and path and "://" in path:
            import fsspec

            try:
                with fsspec.open(path, "rb", **self.options.get("storage_options", {})) as file:
                    content = file.read()  # pyright: ignore[reportAttributeAccessIssue]
            except (OSError, ValueError) as error:
                raise ItemError(f"{path} cannot be read ({files.first_line(error)})") from None
        if content is None:
            return tokenizer.read(path, folder)
        with tempfile.TemporaryDirectory() as place:
            file = f"item{Path(path or '').suffix}"
            (Path(place) / file).write_bytes(content)
            try:
                return tokenizer.read(file, Path(place))
            except ItemError as error:
                raise ItemError(str(error).replace(f"{place}{os.sep}{file}", path or "its bytes")) from None

    def states(self, values: Iterable[Any]) -> dict[str, tuple[int, int]]:
        paths = (value.get("path") if isinstance(value, Mapping) else value for value in values)
        return file_states(self.folder, (path for path in paths if path)) if self.folder else {}

    def advice(self, split: str) -> str:
        return f"Name the one that is for it: splits: {{{split}: …}}."

    def __getstate__(self) -> dict[str, Any]:
        """For loader workers: each opens the table for itself."""
        return {**self.__dict__, "_made": None}

    def _home(self) -> Path | None:
        """The folder of the table, if it is on this machine."""
        for place in (self.data_dir, self._first(), self.path):
            if place and "://" not in place:
                found = Path(place) if Path(place).is_dir() else Path(place).parent
                if found.is_dir() and (place != self.path or Path(place).exists()):
                    return found
        return None

    def _first(self) -> str | None:
        """The first of the files."""
        first = self.data_files
        while isinstance(first, dict | list):
            first = next(iter(first.values() if isinstance(first, dict) else first), None)
        return first

    def _open(self) -> tuple[dict[str, Any], str]:
        """The table of each of its splits, and what identifies its files."""
        import datasets
        from datasets.exceptions import DatasetsError
        from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder

        try:
            if (Path(self.path) / "state.json").exists() or (Path(self.path) / "dataset_dict.json").exists():
                saved = datasets.load_from_disk(self.path)
                tables = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
                key = ",".join(f"{split}={table._fingerprint}" for split, table in tables.items())
                found = {str(split): table.to_iterable_dataset() for split, table in tables.items()}
                return {split: _undecoded(table, False) for split, table in found.items()}, key
            builder = datasets.load_dataset_builder(
                self.path, self.config, data_dir=self.data_dir, data_files=self.data_files, **self.options
            )
            found: dict[Any, Any] = dict(builder.as_streaming_dataset())  # pyright: ignore
            in_folder = isinstance(builder, FolderBasedBuilder)
            tables = {str(split): _undecoded(table, in_folder) for split, table in found.items()}
            return tables, f"{builder.config_id} {builder.hash}"
        except (OSError, ValueError, TypeError, DatasetsError) as error:  # an unknown option is a TypeError
            raise ValueError(f"{self.name} cannot be read: {files.first_line(error)}") from error

    def _parts(self) -> list[_Part]:
        if self._made is None:
            tables, _ = self._open()
            for theirs in self.splits.values():
                if theirs not in tables:
                    raise ValueError(f"{self.name} has no split {theirs!r}. Its splits are {', '.join(tables)}.")
            ours = {split: tables.get(self.splits.get(split, split)) for split in SPLITS}
            self._made = [
                _Part(split, number, table.shard(table.num_shards, number))
                for split, table in ours.items()
                if table is not None
                for number in range(table.num_shards)
            ]
        return self._made

    def _iterate(self, part: int) -> Generator[dict[str, Any]]:
        """The rows of a part, with names in place of the numbers of classes."""
        import datasets
        import pyarrow as pa
        from datasets.exceptions import DatasetsError

        table = self._parts()[part].table
        classes = {key: one for key, one in (table.features or {}).items() if isinstance(one, datasets.ClassLabel)}
        try:
            # Unlike its `__iter__`, `iter` does not divide the part among the workers of a loader once more.
            for columns in table.iter(1):
                row = {key: column[0] for key, column in columns.items()}
                named = {key: classes[key].int2str(row[key]) for key in classes if row[key] is not None}
                yield {**row, **named}
        except (OSError, ValueError, TypeError, pa.ArrowException, DatasetsError) as error:
            raise ValueError(f"{self._part_name(part)} cannot be read: {files.first_line(error)}") from error

    def _part_name(self, part: int) -> str:
        one = self._parts()[part]
        return f"{self.name}, split {one.split!r}, part {one.number}"


def _undecoded(table: Any, in_folder: bool) -> Any:
    """The table with pictures and sounds as bytes or paths, for the tokenizers to read.

    The own `decode(False)` of the library still asks for a decoder of sounds. So their column becomes what it holds:
    names of files in a folder of sounds, else bytes and a name.
    """
    import datasets

    if not table.features:
        return table
    plain = datasets.Value("string")
    sound = plain if in_folder else {"bytes": datasets.Value("binary"), "path": plain}

    def raw(feature: Any) -> Any:
        if isinstance(feature, datasets.Audio):
            return sound
        if isinstance(feature, datasets.List | datasets.LargeList):
            return type(feature)(raw(feature.feature))
        return {key: raw(one) for key, one in feature.items()} if isinstance(feature, dict) else feature

    return table.cast(datasets.Features(raw(dict(table.features)))).decode(False)
