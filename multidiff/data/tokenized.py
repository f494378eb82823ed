"""A data folder tokenized once: shards of codes beside it, made again when something they depend on changes.

Reading happens in loader workers, encoding in `Trainer.predict`, so that devices are Lightning's business. Shards are
Hugging Face `datasets` on disk, memory-mapped. They are only a cache: damaged ones are made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.utils.data import DataLoader

from multidiff import files
from multidiff.data import manifest
from multidiff.data.folder import SPLITS, Record, file_states, metadata_bytes, parse_metadata
from multidiff.sequence.vocabulary import SharedVocabulary
from multidiff.tokenizer import Codes, ItemError, ModalityTokenizer

OnError = Literal["raise", "skip"]
_ITEMS_PER_BATCH = 256
_BYTES_PER_BATCH = 2**24  # of files; what is read of them is often ten times as large
_DOCUMENTS_PER_SHARD = 16_384
_FORMAT = 3
_LOUD_SHARE = 0.1  # of a split's documents: more left out than this is a warning

_warn = rank_zero_only(logging.getLogger(__name__).warning)


def shards(
    folder: Path,
    tokenizers: Mapping[str, ModalityTokenizer],
    vocabulary: SharedVocabulary,
    cache: Path | None = None,
    on_error: OnError = "raise",
    num_workers: int = 0,
) -> Path:
    """The folder of a data folder's shards, made first if need be.

    Args:
        folder: the data folder.
        tokenizers: live tokenizers by name; every name in `metadata.jsonl` must be among them.
        vocabulary: their vocabulary; its fingerprint is part of the shards' address.
        cache: where shards are kept; None means `.tokenized` in the data folder.
        on_error: what an item that cannot be read or tokenized does: "raise" stops with its file and line, "skip"
            leaves out its document and reports how many were left out and why.
        num_workers: processes that read files.

    Raises:
        ValueError: a damaged `metadata.jsonl`, an unknown tokenizer name, a bad item under "raise", a cache that cannot
            be written, damaged shards that cannot be made again.
    """
    path, content = folder / "metadata.jsonl", metadata_bytes(folder)
    records = parse_metadata(content, path)
    for record in records:
        for name, _ in record.segments:
            if name not in tokenizers:
                raise ValueError(
                    f"{path}, line {record.line}: no tokenizer is called {name!r}; "
                    f"the configuration has {', '.join(tokenizers)}"
                )
    states = file_states(folder, (value for record in records for _, value in record.segments))
    cache = cache or folder / ".tokenized"
    place = cache / _address(content, states, vocabulary, on_error)
    _sweep(cache)
    damage = ""
    if os.path.lexists(place):
        try:
            _report(place, manifest.verify(place)["counts"])
            return place
        except ValueError as error:
            damage = str(error)
            _warn(f"{damage}. The shards in {place} are only a cache and are made again.")
    try:
        with files.whole_folder(place, replace=bool(damage)) as beside:
            counts = _tokenize(folder, records, states, tokenizers, beside, on_error, num_workers)
            manifest.write(beside, place.name, counts)
    except ValueError as error:
        if damage:
            raise ValueError(
                f"{error}. The shards in {place} are damaged ({damage}) and were not made again; delete that folder."
            ) from error
        raise
    _report(place, counts)
    return place


class EmptySplitError(ValueError):
    """A split without documents; the message says what to do."""


def open_split(place: Path, split: str) -> Dataset:
    """The documents of a split: rows of "line", "length" (tokens), "names", "labels", "ids" (int32 lists) and "sizes"
    (JSON).

    Raises:
        EmptySplitError: the split is empty.
    """
    content = manifest.read(place)
    parts = sorted({str(Path(name).parent) for name in content["files"] if name.startswith(f"{split}/")})
    if not parts:
        left_out = content["counts"][split]["left_out"]
        raise EmptySplitError(
            f"All {left_out} documents of split {split!r} were left out because they cannot be read. "
            f"{place / 'skipped.json'} says why."
            if left_out
            else f'metadata.jsonl has no documents in split {split!r}. Set "split": "{split}" on at least one line.'
        )
    datasets = [load_from_disk(str(place / part)) for part in parts]
    return concatenate_datasets([dataset for dataset in datasets if isinstance(dataset, Dataset)])


def _address(
    content: bytes, states: Mapping[str, tuple[int, int]], vocabulary: SharedVocabulary, on_error: OnError
) -> str:
    """Hash of all that decides the shards: the lines, the files they name, the tokenizers."""
    digest = hashlib.sha256(f"{_FORMAT} {on_error} {vocabulary.fingerprint}".encode())
    digest.update(content)
    digest.update("\0".join(f"{value} {size} {written}" for value, (size, written) in states.items()).encode())
    return digest.hexdigest()[:24]


def _sweep(cache: Path) -> None:
    """Remove what killed processes left in the cache, also of shards that nobody asks for any more."""
    for left in cache.glob(".*.partial"):
        if made := re.match(r"\.([0-9a-f]{24})\.", left.name):
            files.remove_partial(cache / made[1])


def _tokenize(
    folder: Path,
    records: Sequence[Record],
    states: Mapping[str, tuple[int, int]],
    tokenizers: Mapping[str, ModalityTokenizer],
    place: Path,
    on_error: OnError,
    num_workers: int,
) -> dict[str, dict[str, int]]:
    """Write the shards; returns how many documents of each split were "kept" and "left_out"."""
    # Documents often share items (a sound in several contexts): each is encoded once.
    items: dict[str, dict[str, _Source]] = {name: {} for name in tokenizers}
    for record in records:
        for name, value in record.segments:
            items[name].setdefault(_key(value), _Source(name, value, record.line))
    batches = [batch for some in items.values() for batch in _batches(states, list(some.values()))]
    rank_zero_info(f"Tokenizing {len(records)} documents of {folder}, once: {sum(map(len, batches))} items.")
    encoder = _Encoder(tokenizers, folder, on_error)
    loader = DataLoader(
        _Reader(folder, batches, tokenizers),  # pyright: ignore[reportArgumentType]
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_share_by_name,
        collate_fn=_unchanged,  # torch's own makes tensors of what items are made of
        generator=torch.Generator(),  # leaves the global one alone
    )
    trainer = Trainer(
        accelerator="auto", devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    known: dict[tuple[str, str], _Row | ItemError] = {}
    for part in trainer.predict(encoder, loader) or ():
        known |= part  # pyright: ignore[reportOperatorIssue]
    with files.naming(place):
        return _write(place, folder, records, known)


def _batches(states: Mapping[str, tuple[int, int]], sources: list[_Source]) -> list[list[_Source]]:
    """Sources in batches for `encode`, from the largest file to the smallest.

    Many at once and of like size, so that there are many of the same length: codecs fill the rest of a batch up. The
    largest first, so that what is too large is met early.
    """
    sizes = [states.get(source.value, (0, 0))[0] if isinstance(source.value, str) else 0 for source in sources]
    batches: list[list[_Source]] = []
    room = 0
    for size, source in sorted(zip(sizes, sources, strict=True), key=lambda pair: pair[0], reverse=True):
        if not batches or size > room or len(batches[-1]) == _ITEMS_PER_BATCH:
            batches.append([])
            room = _BYTES_PER_BATCH
        batches[-1].append(source)
        room -= size
    return batches


def _share_by_name(worker: int) -> None:
    """Tensors go to the main process by names, not by open files: a batch of sounds would take one for each."""
    torch.multiprocessing.set_sharing_strategy("file_system")


def _unchanged(batch: Any) -> Any:
    return batch


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


class _Source(NamedTuple):
    """An item as `metadata.jsonl` names it, and the first line that does."""

    name: str
    value: Any
    line: int


class _Reader(torch.utils.data.Dataset):
    """Batches of items of one tokenizer; one that cannot be read is its `ItemError`."""

    def __init__(self, folder: Path, batches: Sequence[Sequence[_Source]], tokenizers: Mapping[str, ModalityTokenizer]):
        self.folder, self.batches, self.tokenizers = folder, batches, tokenizers

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[tuple[_Source, Any]]:
        return [(source, self._read(source)) for source in self.batches[index]]

    def _read(self, source: _Source) -> Any:
        try:
            return self.tokenizers[source.name].read(source.value, self.folder)
        except ItemError as error:
            return error
        except (OSError, ValueError) as error:  # a name that is too long, no permission, a damaged disk
            value = _key(source.value)
            shown = value if len(value) <= 100 else f"{value[:100]}…"
            return ItemError(f"{shown} cannot be read ({getattr(error, 'strerror', None) or error})")


class _Row(NamedTuple):
    """What a shard keeps of an item's codes."""

    ids: np.ndarray
    size: str

    @classmethod
    def of(cls, name: str, codes: Codes, tokenizer: ModalityTokenizer) -> _Row:
        """What is kept of these codes. Ids are checked here, once; `ValueError` for one outside of its codebook."""
        sizes_N = torch.tensor(tokenizer.codebook_sizes)[codes.levels_N]
        if bool(((codes.ids_N < 0) | (codes.ids_N >= sizes_N)).any()):
            raise ValueError(
                f"Tokenizer {name!r} made a code outside of its codebooks of {tokenizer.codebook_sizes}. Its plugin "
                "breaks its contract; multidiff.testing.check_tokenizer says how."
            )
        return cls(codes.ids_N.int().numpy(), json.dumps(codes.size))


class _Encoder(LightningModule):
    """What shards keep, or the error, of every item by tokenizer and `_key`."""

    def __init__(self, tokenizers: Mapping[str, ModalityTokenizer], folder: Path, on_error: OnError):
        super().__init__()
        self.codecs = dict(tokenizers)
        self.folder, self.on_error = folder, on_error

    def on_predict_start(self) -> None:
        for tokenizer in self.codecs.values():
            tokenizer.to(self.device)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # items of any kind; tokenizers move what they need

    def on_predict_end(self) -> None:
        for tokenizer in self.codecs.values():
            tokenizer.to("cpu")

    def predict_step(self, batch: list[tuple[_Source, Any]]) -> dict[tuple[str, str], _Row | ItemError]:
        name = batch[0][0].name  # a batch is of one tokenizer
        results = _encode(self.codecs[name], {index: item for index, (_, item) in enumerate(batch)})
        rows: dict[tuple[str, str], _Row | ItemError] = {}
        for index, (source, _) in enumerate(batch):
            codes = results[index]
            if isinstance(codes, ItemError) and self.on_error == "raise":
                message = _complaint(self.folder, source.line, codes).rstrip(".")
                raise ValueError(f"{message}. Or set on_error: skip to leave such documents out.")
            row = codes if isinstance(codes, ItemError) else _Row.of(name, codes, self.codecs[name])
            rows[name, _key(source.value)] = row
        return rows


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


def _complaint(folder: Path, line: int, error: ItemError) -> str:
    return f"{folder / 'metadata.jsonl'}, line {line}: {error}"


def _write(
    place: Path, folder: Path, records: Sequence[Record], known: Mapping[tuple[str, str], _Row | ItemError]
) -> dict[str, dict[str, int]]:
    """Shards of each split, and a report of the documents left out."""
    errors = []
    counts = {split: {"kept": 0, "left_out": 0} for split in SPLITS}
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for record in records:
        codes = [known[name, _key(value)] for name, value in record.segments]
        bad = [one for one in codes if isinstance(one, ItemError)]
        counts[record.split]["left_out" if bad else "kept"] += 1
        if bad:
            errors.append(_complaint(folder, record.line, bad[0]))
            continue
        good = [one for one in codes if isinstance(one, _Row)]
        rows[record.split].append(
            {
                "line": record.line,
                "length": 1 + sum(2 + len(one.ids) for one in good),  # <bos>, each segment's begin and end, the codes
                "names": [name for name, _ in record.segments],
                "labels": record.labels,
                "ids": [one.ids for one in good],
                "sizes": [one.size for one in good],
            }
        )
    for split, of_split in rows.items():
        for number, start in enumerate(range(0, len(of_split), _DOCUMENTS_PER_SHARD)):
            shard = Dataset.from_list(of_split[start : start + _DOCUMENTS_PER_SHARD])
            shard.save_to_disk(str(place / split / f"part-{number:05d}"))
    (place / "skipped.json").write_text(json.dumps(errors, indent=2), encoding="utf-8")
    return counts


def _report(place: Path, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Say what was left out, loudly where it is much of a split."""
    left_out = sum(count["left_out"] for count in counts.values())
    if not left_out:
        return
    rank_zero_info(f"Left out {left_out} documents that cannot be read, listed in {place / 'skipped.json'}:")
    for message in json.loads(files.read_text(place / "skipped.json"))[:3]:
        rank_zero_info(f"  {message}")
    for split, count in counts.items():
        warn_of_share(split, count["left_out"], sum(count.values()), f"see {place / 'skipped.json'}")


def warn_of_share(split: str, left_out: int, documents: int, see: str) -> None:
    """Warn where more than a tenth of a split's documents is left out."""
    if left_out > _LOUD_SHARE * documents:
        _warn(
            f"WARNING: {left_out / documents:.0%} of split {split!r} is left out, {left_out} of {documents} documents; "
            f"{see}."
        )
