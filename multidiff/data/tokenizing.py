"""A source tokenized once: shards of codes, of which a killed run leaves what it has finished.

Reading happens in loader workers, encoding in `Trainer.predict`, so devices and processes are Lightning's business. The
parts of a source are divided among processes and workers. A part is read in windows of some thousand documents, and
memory holds one window for each worker. When all items of a window are encoded, its shards are written, and then the
window's own file, which says that they are whole.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.utils.data import DataLoader, get_worker_info

from multidiff import files
from multidiff.data.shards import Counts, Kind, Row, Shard, ShardFolder, ShardInfo, write_shard
from multidiff.data.sources.source import SPLITS, Record, Source
from multidiff.sequence.vocabulary import SharedVocabulary
from multidiff.tokenizer import Codes, ItemError, ModalityTokenizer

OnError = Literal["raise", "skip"]
_ITEMS_PER_BATCH = 256
_BYTES_PER_BATCH = 2**24  # of files; what is read of them is often ten times as large
_DOCUMENTS_PER_WINDOW = 8_192
_BYTES_PER_WINDOW = 2**25  # of values as they are written down
_FORMAT = 4
_LOUD_SHARE = 0.1  # of a split's documents: more left out than this is a warning

_warn = rank_zero_only(logging.getLogger(__name__).warning)


def tokenize(
    source: Source,
    tokenizers: Mapping[str, ModalityTokenizer],
    vocabulary: SharedVocabulary,
    cache: Path | None = None,
    on_error: OnError = "raise",
    num_workers: int = 0,
    timeout: float = 0.0,
    check_files: bool = True,
    trainer: Trainer | None = None,
) -> ShardFolder:
    """The shards of a source. Those that are missing, damaged or out of date are made first.

    Args:
        source: of documents.
        tokenizers: live tokenizers by name; every name in the source must be among them.
        vocabulary: their vocabulary; its fingerprint is part of the shards' address.
        cache: where shards are kept; None leaves it to the source.
        on_error: what an item that cannot be read or tokenized does: "raise" stops with its place, "skip" leaves out
            its document and reports how many were left out and why.
        num_workers: processes that read files.
        timeout: seconds that a worker may take for a batch of items; 0 waits for ever.
        check_files: look at size and time of every file that the source names, and make the shards of those that have
            changed again. A million files take some seconds.
        trainer: runs the tokenizers, on one or several devices; None makes one with a single device.

    Raises:
        ValueError: a source that cannot be read, an unknown tokenizer name, a bad item under "raise", a folder that
            cannot be written, a worker that dies or takes too long.
    """
    facts = [_FORMAT, on_error, vocabulary.fingerprint, source.fingerprint()]
    if cache is not None:  # it may hold the shards of others, whose files have the same names
        facts.append(str(source.home))
    place = (cache or source.cache) / hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    if (place / "shards.json").exists():
        try:
            found = ShardFolder.load(place)
            changed = _changed(place, source) if check_files else []
        except ValueError as error:
            _warn(f"{error}. What is damaged in {place} is made again.")
            changed = []
        else:
            if not changed:
                _report(found)
                return found
        # First what says that all is whole, so that an interruption leaves nothing that passes for it.
        for path in (place / "shards.json", *changed):
            path.unlink(missing_ok=True)
    if trainer is None:
        trainer = Trainer(
            accelerator="auto", devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False
        )
    reading = _Reading(num_workers)
    encoder = _Encoder(tokenizers, place, source, on_error, reading, num_workers, timeout)
    if trainer.is_global_zero:
        source.check(tokenizers)
    rank_zero_info(f"Tokenizing {source.name}, once, into {place}.")
    with files.naming(place):
        for folder in (place, *(place / split for split in SPLITS)):
            folder.mkdir(parents=True, exist_ok=True)
            files.remove_partial(folder / "*")
    try:
        trainer.predict(encoder, return_predictions=False)
    except RuntimeError as error:
        if str(error).startswith(("DataLoader worker", "DataLoader timed out")):
            raise ValueError(f"{source.name}: {reading.complaint()} ({files.first_line(error)}).") from error
        raise
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        _gather(place, source.parts()).save()
    trainer.strategy.barrier()
    found = ShardFolder.load(place)
    _report(found)
    return found


class EmptySplitError(ValueError):
    """A split without documents; the message says what to do."""


def check_split(shards: ShardFolder, split: str, source: Source) -> None:
    """Raise an `EmptySplitError` if a split has no documents."""
    if shards.shards.get(split):
        return
    left_out = shards.counts[split].left_out
    raise EmptySplitError(
        f"All {left_out} documents of split {split!r} were left out because they cannot be read. "
        f"{shards.path / 'skipped.json'} says why."
        if left_out
        else f"{source.name} has no documents in split {split!r}. {source.advice(split)}"
    )


def warn_of_share(split: str, left_out: int, documents: int, see: str) -> None:
    """Warn where more than a tenth of a split's documents is left out."""
    if left_out > _LOUD_SHARE * documents:
        _warn(
            f"WARNING: {left_out / documents:.0%} of split {split!r} is left out, {left_out} of {documents} documents; "
            f"{see}."
        )


class _Value(NamedTuple):
    """An item as a source names it, and the line of the first document that does."""

    name: str
    value: Any
    line: int

    @property
    def key(self) -> tuple[str, str]:
        return self.name, json.dumps(self.value, sort_keys=True, default=_digest)


@dataclass
class _Window:
    """Some thousand documents of a part, which are written together.

    Attributes:
        part, number: of the part, and of the window in it.
        records: the documents.
        last: whether the part ends with it.
        files: states of the files that the records name.
    """

    part: int
    number: int
    records: list[Record]
    last: bool
    files: dict[str, tuple[int, int]]

    @property
    def file(self) -> str:
        return _file(self.part, self.number)


@dataclass
class _Batch:
    """Items of one tokenizer, read; one that cannot be read is its `ItemError`.

    Attributes:
        part: of the source.
        values: what the items stand for.
        items: one for each value.
        window: the window that is complete with this batch.
        error: the source itself cannot be read.
    """

    part: int
    values: list[_Value] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    window: _Window | None = None
    error: ValueError | None = None


class _Reading:
    """What each worker is reading, so that an error can name it if the worker dies or hangs."""

    def __init__(self, num_workers: int):
        self._texts: list[Any] = [multiprocessing.Array(ctypes.c_char, 512, lock=False) for _ in range(num_workers)]

    def announce(self, text: str) -> None:
        worker = get_worker_info()
        assert worker is not None
        self._texts[worker.id].value = text.encode(errors="replace")[:500]

    def complaint(self) -> str:
        texts = [text.value.decode(errors="replace") for text in self._texts]
        return f"a worker died or took too long. The workers were reading {', '.join(filter(None, texts)) or 'nothing'}"


class _Windows(torch.utils.data.IterableDataset):
    """The batches of the parts that belong to a process and worker, as far as their windows are not written yet."""

    def __init__(
        self,
        source: Source,
        tokenizers: Mapping[str, ModalityTokenizer],
        place: Path,
        reading: _Reading,
        rank: int,
        ranks: int,
    ):
        self.source, self.tokenizers, self.place, self.reading = source, tokenizers, place, reading
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[_Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for part in range(self.rank * workers + number, self.source.parts(), self.ranks * workers):
            try:
                for window in self._windows(part):
                    yield from self._batches(window)
            except ValueError as error:  # the loader would bury its sentence in a traceback
                yield _Batch(part, error=error)

    def _windows(self, part: int) -> Iterator[_Window]:
        """The windows of a part that have to be made."""
        number, records, room = 0, [], _BYTES_PER_WINDOW
        for record in self.source.read(part):
            if records and (len(records) == _DOCUMENTS_PER_WINDOW or room <= 0):
                if not _is_whole(self.place, _file(part, number)):
                    yield self._window(part, number, records, False)
                number, records, room = number + 1, [], _BYTES_PER_WINDOW
            room -= sum(_weight(value) for _, value in record.segments)
            records.append(record)
        if not _is_whole(self.place, _file(part, number)):
            yield self._window(part, number, records, True)

    def _window(self, part: int, number: int, records: list[Record], last: bool) -> _Window:
        states = self.source.states(value for record in records for _, value in record.segments)
        return _Window(part, number, records, last, states)

    def _batches(self, window: _Window) -> Iterator[_Batch]:
        # Documents often share items (a sound in several contexts): each is encoded once.
        values: dict[tuple[str, str], _Value] = {}
        for record in window.records:
            for name, value in record.segments:
                one = _Value(name, value, record.line)
                values.setdefault(one.key, one)
        for some in _grouped(window.files, list(values.values())):
            yield _Batch(window.part, some, [self._read(window.part, one) for one in some])
        yield _Batch(window.part, window=window)

    def _read(self, part: int, one: _Value) -> Any:
        if get_worker_info() is not None:
            self.reading.announce(f"{self.source.where(part, one.line)}: {_shown(one.value)}")
        try:
            return self.source.item(self.tokenizers[one.name], one.value)
        except ItemError as error:
            return error
        except (OSError, ValueError) as error:  # a name that is too long, no permission, a damaged disk
            return ItemError(f"{_shown(one.value)} cannot be read ({getattr(error, 'strerror', None) or error})")


class _Encoder(LightningModule):
    """Encodes batches, and writes the shards of a window when it is complete."""

    def __init__(
        self,
        tokenizers: Mapping[str, ModalityTokenizer],
        place: Path,
        source: Source,
        on_error: OnError,
        reading: _Reading,
        num_workers: int,
        timeout: float,
    ):
        super().__init__()
        self.codecs = dict(tokenizers)
        self.place, self.source, self.on_error = place, source, on_error
        self.reading, self.num_workers, self.timeout = reading, num_workers, timeout
        self._known: dict[int, dict[tuple[str, str], _Kept | ItemError]] = {}  # of the open window of each part

    def predict_dataloader(self) -> DataLoader:
        """The batches of this process, which only now knows its rank."""
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(
            _Windows(self.source, self.codecs, self.place, self.reading, rank, ranks),
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=_share_by_name,
            collate_fn=_unchanged,  # torch's own makes tensors of what items are made of
            generator=torch.Generator(),  # leaves the global one alone
            timeout=self.timeout if self.num_workers else 0.0,
        )

    def on_predict_start(self) -> None:
        for tokenizer in self.codecs.values():
            tokenizer.to(self.device)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # items of any kind; tokenizers move what they need

    def on_predict_end(self) -> None:
        for tokenizer in self.codecs.values():
            tokenizer.to("cpu")

    def predict_step(self, batch: _Batch) -> int:
        """How many items the batch has: Lightning warns of steps that return nothing."""
        if batch.error is not None:
            raise batch.error
        known = self._known.setdefault(batch.part, {})
        if batch.values:
            tokenizer = self.codecs[batch.values[0].name]
            results = _encode(tokenizer, dict(enumerate(batch.items)))
            for index, one in enumerate(batch.values):
                codes = results[index]
                if isinstance(codes, ItemError) and self.on_error == "raise":
                    message = f"{self.source.where(batch.part, one.line)}: {codes}".rstrip(".")
                    raise ValueError(f"{message}. Or set on_error: skip to leave such documents out.")
                known[one.key] = codes if isinstance(codes, ItemError) else _Kept.of(one.name, codes, tokenizer)
        if batch.window is not None:
            self._write(batch.window, self._known.pop(batch.part))
        return len(batch.values)

    def _write(self, window: _Window, known: Mapping[tuple[str, str], _Kept | ItemError]) -> None:
        messages: list[str] = []
        counts = {split: Counts() for split in SPLITS}
        rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
        for record in window.records:
            codes = [known[_Value(name, value, record.line).key] for name, value in record.segments]
            bad = next((one for one in codes if isinstance(one, ItemError)), None)
            if bad is not None:
                counts[record.split].left_out += 1
                messages.append(f"{self.source.where(window.part, record.line)}: {bad}")
                continue
            good = [one for one in codes if isinstance(one, _Kept)]
            kinds = [
                Kind(name, label, one.size, len(one.ids))
                for (name, _), label, one in zip(record.segments, record.labels, good, strict=True)
            ]
            counts[record.split].add(kinds)
            rows[record.split].append(Row(record.line, kinds, [one.ids for one in good]))
        shards = {
            split: write_shard(self.place, f"{split}/{window.file}.arrow", window.part, of_split)
            for split, of_split in rows.items()
            if of_split
        }
        content = {
            "shards": shards,
            "counts": {split: of_split.to_dict() for split, of_split in counts.items()},
            "left_out": messages,
            "files": window.files,
            "last": window.last,
        }
        files.write_json(self.place / f"{window.file}.json", content)


class _Kept(NamedTuple):
    """What a shard keeps of an item's codes."""

    ids: np.ndarray
    size: str

    @classmethod
    def of(cls, name: str, codes: Codes, tokenizer: ModalityTokenizer) -> _Kept:
        """What is kept of these codes. Ids are checked here, once; `ValueError` for one outside of its codebook."""
        sizes_N = torch.tensor(tokenizer.codebook_sizes)[codes.levels_N]
        if bool(((codes.ids_N < 0) | (codes.ids_N >= sizes_N)).any()):
            raise ValueError(
                f"Tokenizer {name!r} made a code outside of its codebooks of {tokenizer.codebook_sizes}. Its plugin "
                "breaks its contract; multidiff.testing.check_tokenizer says how."
            )
        return cls(codes.ids_N.int().numpy(), json.dumps(codes.size))


def _encode(tokenizer: ModalityTokenizer, items: dict[Any, Any]) -> dict[Any, Codes | ItemError]:
    """Codes, or the error, of each item: all in one batch, and half by half where the batch has a bad one."""
    results: dict[Any, Codes | ItemError] = {k: item for k, item in items.items() if isinstance(item, ItemError)}
    good = {key: item for key, item in items.items() if key not in results}
    if not good:
        return results
    try:
        return results | dict(zip(good, tokenizer.encode(list(good.values())), strict=True))
    except ItemError as error:
        if len(good) == 1:
            return results | dict.fromkeys(good, error)
    pairs, middle = list(good.items()), len(good) // 2
    for half in (pairs[:middle], pairs[middle:]):
        results |= _encode(tokenizer, dict(half))
    return results


def _grouped(states: Mapping[str, tuple[int, int]], values: Sequence[_Value]) -> Iterator[list[_Value]]:
    """Values in batches for `encode`, each of one tokenizer, from the largest file to the smallest.

    Many at once and of like size, so that there are many of the same length: codecs fill the rest of a batch up. The
    largest first, so that what is too large is met early.
    """
    by_name: dict[str, list[tuple[int, _Value]]] = {}
    for one in values:
        size = _weight(one.value)
        path = one.value.get("path") if isinstance(one.value, Mapping) else one.value
        if isinstance(path, str) and path in states:
            size, _ = states[path]
        by_name.setdefault(one.name, []).append((size, one))
    for of_name in by_name.values():
        batch, room = [], _BYTES_PER_BATCH
        for size, one in sorted(of_name, key=lambda pair: pair[0], reverse=True):
            if batch and (size > room or len(batch) == _ITEMS_PER_BATCH):
                yield batch
                batch, room = [], _BYTES_PER_BATCH
            batch.append(one)
            room -= size
        yield batch


def _file(part: int, window: int) -> str:
    return f"{part:05d}-{window:03d}"


def _is_whole(place: Path, file: str) -> bool:
    """Whether a window is written, and its shards are what was written."""
    try:
        content = files.read_json(place / f"{file}.json")
        for info in content["shards"].values():
            Shard(place, ShardInfo(*info))
        return isinstance(content["last"], bool)
    except (ValueError, KeyError, TypeError):
        return False


def _changed(place: Path, source: Source) -> list[Path]:
    """The windows that name files which have changed since."""
    changed = []
    for path in sorted(place.glob("[0-9]*-[0-9]*.json")):
        known = {value: tuple(state) for value, state in files.read_json(path)["files"].items()}
        if known and source.states(known) != known:
            changed.append(path)
    return changed


def _gather(place: Path, parts: int) -> ShardFolder:
    """All windows of all parts, and the list of documents that were left out."""
    shards: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    counts, messages = {split: Counts() for split in SPLITS}, []
    for part in range(parts):
        window, last = 0, False
        while not last:
            content = files.read_json(place / f"{_file(part, window)}.json")
            for split, info in content["shards"].items():
                shards[split].append(ShardInfo(*info))
            for split, of_split in content["counts"].items():
                counts[split].merge(Counts.from_dict(of_split))
            messages += content["left_out"]
            window, last = window + 1, content["last"]
    files.write_bytes(place / "skipped.json", json.dumps(messages, indent=2).encode())
    return ShardFolder(place, shards, counts)


def _report(shards: ShardFolder) -> None:
    """Say what was left out, loudly where it is much of a split."""
    left_out = sum(counts.left_out for counts in shards.counts.values())
    if not left_out:
        return
    listed = shards.path / "skipped.json"
    rank_zero_info(f"Left out {left_out} documents that cannot be read, listed in {listed}:")
    for message in json.loads(files.read_text(listed))[:3]:
        rank_zero_info(f"  {message}")
    for split, counts in shards.counts.items():
        warn_of_share(split, counts.left_out, counts.left_out + counts.documents, f"see {listed}")


def _share_by_name(worker: int) -> None:
    """Tensors go to the main process by names, not by open files: a batch of sounds would take one for each."""
    torch.multiprocessing.set_sharing_strategy("file_system")


def _unchanged(batch: Any) -> Any:
    return batch


def _weight(value: Any) -> int:
    """About how many bytes of memory a value takes."""
    if isinstance(value, Mapping):
        return sum(map(_weight, value.values()))
    return len(value) if isinstance(value, str | bytes) else 8


def _digest(content: Any) -> str:
    """What stands for bytes, or for what else JSON does not know, in the key of an item."""
    return hashlib.sha256(content if isinstance(content, bytes) else repr(content).encode()).hexdigest()


def _shown(value: Any) -> str:
    text = json.dumps(
        value,
        sort_keys=True,
        default=lambda content: f"{len(content)} bytes" if isinstance(content, bytes) else str(content),
    )
    return text if len(text) <= 100 else f"{text[:100]}…"
