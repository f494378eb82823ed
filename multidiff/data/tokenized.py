"""A data folder tokenized once: shards of codes beside it, made again only when something they depend on changes.

Reading happens in loader workers, encoding in `Trainer.predict`, writing in a callback, so that devices are Lightning's
business. Shards are Hugging Face `datasets` on disk, memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from multidiff.data.folder import SPLITS, Record, read_metadata
from multidiff.tokenizer import Codes, ItemError, ModalityTokenizer
from multidiff.vocabulary import SharedVocabulary

OnError = Literal["raise", "skip"]
_DOCUMENTS_PER_BATCH = 64
_DOCUMENTS_PER_SHARD = 16_384
_FORMAT = 1


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
        ValueError: a damaged `metadata.jsonl`, an unknown tokenizer name, a bad item under "raise".
    """
    records = read_metadata(folder)
    for record in records:
        for name, _ in record.segments:
            if name not in tokenizers:
                raise ValueError(
                    f"{folder / 'metadata.jsonl'}, line {record.line}: no tokenizer is called {name!r}; "
                    f"the configuration has {', '.join(tokenizers)}"
                )
    place = (cache or folder / ".tokenized") / _address(folder, records, vocabulary, on_error)
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".making.", dir=place.parent))
        try:
            beside.chmod(0o755)
            _tokenize(folder, records, tokenizers, beside, on_error, num_workers)
            try:
                beside.rename(place)
            except OSError:
                if not place.is_dir():  # else another run was quicker
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    _report(place)
    return place


def open_split(place: Path, split: str) -> Dataset:
    """The documents of a split: rows of "line", "names", "ids" (int32 lists) and "sizes" (JSON).

    Raises:
        ValueError: the split is empty.
    """
    parts = sorted((place / split).glob("part-*"))
    if not parts:
        skipped = len(json.loads((place / "skipped.json").read_text(encoding="utf-8")))
        hint = f"{skipped} documents were left out, see {place / 'skipped.json'}" if skipped else "give some lines it"
        raise ValueError(f"no document of split {split!r} in metadata.jsonl: {hint}")
    datasets = [load_from_disk(str(part)) for part in parts]
    return concatenate_datasets([dataset for dataset in datasets if isinstance(dataset, Dataset)])


def _address(folder: Path, records: Sequence[Record], vocabulary: SharedVocabulary, on_error: OnError) -> str:
    """Hash of all that decides the shards: the lines, the files they name, the tokenizers."""
    digest = hashlib.sha256(f"{_FORMAT} {on_error} {vocabulary.fingerprint}".encode())
    digest.update((folder / "metadata.jsonl").read_bytes())
    for value in {value: None for record in records for _, value in record.segments if isinstance(value, str)}:
        # Most texts are no file names; asking is cheap, but a long one makes the system refuse.
        file = folder / value
        if len(value) < 255 and "\0" not in value and file.is_file():
            status = file.stat()
            digest.update(f"{value} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _tokenize(
    folder: Path,
    records: Sequence[Record],
    tokenizers: Mapping[str, ModalityTokenizer],
    place: Path,
    on_error: OnError,
    num_workers: int,
) -> None:
    loader = DataLoader(
        _Reader(folder, records, tokenizers),  # pyright: ignore[reportArgumentType]
        batch_size=_DOCUMENTS_PER_BATCH,
        collate_fn=list,
        num_workers=num_workers,
    )
    rank_zero_info(f"Tokenizing {len(records)} documents of {folder}, once.")
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[_ShardWriter(place)],
    )
    trainer.predict(_Encoder(tokenizers, folder, on_error), loader, return_predictions=False)


class _Reader(torch.utils.data.Dataset):
    """Documents with their items read; an item that cannot be read is its `ItemError`."""

    def __init__(self, folder: Path, records: Sequence[Record], tokenizers: Mapping[str, ModalityTokenizer]):
        self.folder, self.records, self.tokenizers = folder, records, tokenizers

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Record, list[Any]]:
        record = self.records[index]
        return record, [self._read(name, value) for name, value in record.segments]

    def _read(self, name: str, value: Any) -> Any:
        try:
            return self.tokenizers[name].read(value, self.folder)
        except ItemError as error:
            return error


class _Encoder(LightningModule):
    def __init__(self, tokenizers: Mapping[str, ModalityTokenizer], folder: Path, on_error: OnError):
        super().__init__()
        self.codecs = dict(tokenizers)
        self.folder, self.on_error = folder, on_error
        # Documents often share items (a sound in several contexts); codes are small.
        self.known: dict[tuple[str, str], Codes | ItemError] = {}

    def on_predict_start(self) -> None:
        for tokenizer in self.codecs.values():
            tokenizer.to(self.device)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # items of any kind; tokenizers move what they need

    def on_predict_end(self) -> None:
        for tokenizer in self.codecs.values():
            tokenizer.to("cpu")

    def predict_step(self, batch: list[tuple[Record, list[Any]]]) -> list[dict[str, Any]]:
        for name, tokenizer in self.codecs.items():
            fresh = {}
            for record, items in batch:
                for (other, value), item in zip(record.segments, items, strict=True):
                    key = (name, json.dumps(value, sort_keys=True))
                    if other == name and key not in self.known:
                        fresh[key] = item
            self.known |= _encode(tokenizer, fresh)
        return [self._row(record) for record, _ in batch]

    def _row(self, record: Record) -> dict[str, Any]:
        row: dict[str, Any] = {"split": record.split, "line": record.line, "names": [], "ids": [], "sizes": []}
        for name, value in record.segments:
            codes = self.known[name, json.dumps(value, sort_keys=True)]
            if isinstance(codes, ItemError):
                message = f"{self.folder / 'metadata.jsonl'}, line {record.line}: {codes}"
                if self.on_error == "raise":
                    raise ValueError(f"{message} (on_error: skip leaves such documents out)")
                return {"error": message}
            row["names"].append(name)
            row["ids"].append(codes.ids_N.int().numpy())
            row["sizes"].append(json.dumps(codes.size))
        return row


def _encode(tokenizer: ModalityTokenizer, items: dict[Any, Any]) -> dict[Any, Codes | ItemError]:
    """Codes, or the error, of each item: all in one batch, and one by one where the batch has a bad one."""
    results: dict[Any, Codes | ItemError] = {k: item for k, item in items.items() if isinstance(item, ItemError)}
    good = {key: item for key, item in items.items() if key not in results}
    try:
        return results | dict(zip(good, tokenizer.encode(list(good.values())), strict=True))
    except ItemError as error:
        if len(good) == 1:
            return results | dict.fromkeys(good, error)
    for key, item in good.items():
        results |= _encode(tokenizer, {key: item})
    return results


class _ShardWriter(BasePredictionWriter):
    """Collects rows and writes a shard of each split when enough have come; what was left out goes to a report."""

    def __init__(self, place: Path):
        super().__init__(write_interval="batch")
        self.place = place
        self.rows: dict[str, list[dict[str, Any]]] = {str(split): [] for split in SPLITS}
        self.written: dict[str, int] = dict.fromkeys(SPLITS, 0)
        self.errors: list[str] = []

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *_: Any) -> None:
        for row in prediction:
            if "error" in row:
                self.errors.append(row["error"])
            else:
                rows = self.rows[row.pop("split")]
                rows.append(row)
                if len(rows) == _DOCUMENTS_PER_SHARD:
                    self._flush()

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        self._flush()
        (self.place / "skipped.json").write_text(json.dumps(self.errors, indent=2), encoding="utf-8")

    def _flush(self) -> None:
        for split, rows in self.rows.items():
            if rows:
                part = self.place / split / f"part-{self.written[split]:05d}"
                Dataset.from_list(rows).save_to_disk(str(part))
                self.written[split] += 1
                rows.clear()


def _report(place: Path) -> None:
    errors = json.loads((place / "skipped.json").read_text(encoding="utf-8"))
    if errors:
        rank_zero_info(f"Left out {len(errors)} documents that cannot be read, listed in {place / 'skipped.json'}:")
        for message in errors[:3]:
            rank_zero_info(f"  {message}")
