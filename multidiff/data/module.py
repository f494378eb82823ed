"""`DocumentDataModule`: a data folder as batches of documents for training and evaluation."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from multidiff import plugins
from multidiff.data import tokenized
from multidiff.data.counts import count
from multidiff.data.folder import SPLITS
from multidiff.data.length import LongDocuments, Selection, select
from multidiff.seeding import generator_for
from multidiff.sequence.seen import SeenDocuments, most_units
from multidiff.sequence.sequencer import Segment, Sequencer, TokenBatch
from multidiff.sequence.vocabulary import SharedVocabulary
from multidiff.tokenizer import Codes

STAND_IN_EPOCH = -1


class BatchedData(LightningDataModule):
    """Base of data modules that `EpochBatches` serve: whose documents a process gets, and whether it may go on.

    Attributes:
        batch_size: documents of a batch, on each device.
    """

    batch_size: int

    def rank(self) -> tuple[int, int]:
        """This process among those that train together, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def state_dict(self) -> dict[str, int]:
        return {"ranks": self.rank()[1], "batch_size": self.batch_size}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Check that the training goes on as it was; else an epoch would show some documents twice and others never.

        Raises:
            ValueError: training goes on with another number of processes or another batch size.
        """
        assert self.trainer is not None
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        names = {"ranks": "processes (devices times nodes)", "batch_size": "documents in a batch of each process"}
        for key, value in self.state_dict().items():
            if state_dict[key] != value:
                raise ValueError(
                    f"the checkpoint (--ckpt_path) was written in a training with {state_dict[key]} {names[key]}, but "
                    f"this one has {value}, with which an epoch would show some documents twice. Continue it as it was."
                )


class DocumentDataModule(BatchedData):
    """Documents of a data folder, tokenized once, in batches of packed rows.

    Args:
        folder: holds `metadata.jsonl` (`multidiff.data.folder`).
        tokenizers: name -> {plugin: …, arguments}, as the model has them; in YAML write
            `${model.init_args.tokenizers}`.
        batch_size: documents of a batch, on each device.
        row_length: documents are packed into rows of this many tokens; null gives each a row of its own.
        max_eos_padding: largest number of EOS, in units (tokens, frames), after a text, a sound or another item of
            varying length, by tokenizer name; drawn uniformly from 1. What is not named gets canvases up to the size
            that holds 95 % of the training items, which is the size of a blank in generation, and up to a quarter more
            than its length at least.
        shuffle_segments: order the segments of a training document at random, each time again, so that the model works
            in any order. Set it to false where the order carries meaning, as in a dialogue or a sequence of pictures;
            generation then has to ask in an order that was trained.
        cache: where codes are kept; null means `.tokenized` in the data folder.
        on_error: "raise", or "skip" documents that cannot be read and say how many.
        max_seq_length: most tokens of a document: `<bos>`, two structure tokens a segment, and its codes, without
            the EOS that max_eos_padding adds. Attention is quadratic. Null means no limit.
        long_documents: what a longer document does. "raise" stops with its file and line. "skip" leaves it out and says
            how many there are. "crop" cuts its segments of varying length at their ends, the longest most, and forgets
            the rest. "split" makes several documents of one that is a single segment of varying length, and keeps all
            codes. Cuts lie between tokens or frames, and no stops follow them, for the item goes on. What cannot be
            cropped or split raises.
        num_workers: processes that read files and build batches.
        seed: of order and max_eos_padding.
    """

    def __init__(
        self,
        folder: str,
        tokenizers: dict[str, dict[str, Any]],
        batch_size: int = 64,
        row_length: int | None = 256,
        max_eos_padding: dict[str, int] | None = None,
        shuffle_segments: bool = True,
        cache: str | None = None,
        on_error: tokenized.OnError = "raise",
        max_seq_length: int | None = 8192,
        long_documents: LongDocuments = "raise",
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        if batch_size < 1 or (row_length is not None and row_length < 1):
            raise ValueError(f"batch_size {batch_size} and row_length {row_length} must be at least 1")
        if max_seq_length is not None and max_seq_length < 1:
            raise ValueError(f"max_seq_length {max_seq_length} must be at least 1, or null for no limit")
        if long_documents not in get_args(LongDocuments):
            raise ValueError(f"long_documents {long_documents!r} is none of {', '.join(get_args(LongDocuments))}")
        for name, units in (max_eos_padding or {}).items():
            if name not in tokenizers:
                raise ValueError(
                    f"max_eos_padding {name}: no tokenizer has this name. There are {', '.join(tokenizers)}."
                )
            if units < 1:
                raise ValueError(f"max_eos_padding {name}: {units} must be at least 1")
        self.folder = Path(folder)
        self.batch_size, self.row_length, self.num_workers, self.seed = batch_size, row_length, num_workers, seed
        self.max_eos_padding, self.shuffle_segments = max_eos_padding or {}, shuffle_segments
        self.cache = Path(cache) if cache else None
        self.on_error: tokenized.OnError = on_error
        self.max_seq_length = max_seq_length
        self.long_documents: LongDocuments = long_documents
        self.tokenizers = plugins.build(tokenizers)
        for name in self.max_eos_padding:
            if not self.tokenizers[name].variable_length:
                raise ValueError(
                    f"max_eos_padding {name}: its length never varies, so it has no stops to leave room for"
                )
        self.vocabulary = SharedVocabulary.of(self.tokenizers)
        self.sequencer = Sequencer(self.tokenizers, self.vocabulary)
        self.shards: Path | None = None
        self._prepared: Path | None = None
        self._selections: dict[tuple[Path, str], tuple[Dataset, Selection]] = {}
        self._documents: dict[tuple[Path, str], Documents] = {}
        self._seen: dict[Path, SeenDocuments] = {}

    def prepare_data(self) -> None:
        self._prepared = self._shards()

    def setup(self, stage: str) -> None:
        # Parsing and verifying take seconds for a large folder: once a process is enough.
        self.shards, self._prepared = self._prepared or self._shards(), None

    def _shards(self) -> Path:
        return tokenized.shards(
            self.folder, self.tokenizers, self.vocabulary, self.cache, self.on_error, self.num_workers
        )

    def train_dataloader(self) -> StatefulDataLoader:
        rank, ranks = self.rank()
        documents = self.documents("train")
        order = ShuffledBatches(len(documents), self.batch_size, self.seed, rank, ranks)
        return self._loader(documents, order)

    def val_dataloader(self) -> StatefulDataLoader:
        return self._evaluation("validation")

    def test_dataloader(self) -> StatefulDataLoader:
        return self._evaluation("test")

    def _evaluation(self, split: str) -> StatefulDataLoader:
        rank, ranks = self.rank()
        documents = self.documents(split)
        # As many for every rank, so that none waits for another in vain; what stands in counts for nothing.
        indices = [(0 if index < len(documents) else STAND_IN_EPOCH, index % len(documents))
                   for index in range(rank, -(-len(documents) // ranks) * ranks, ranks)]  # fmt: skip
        batches = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
        return self._loader(documents, batches)

    def _loader(self, documents: Documents, batches: Iterable[list[tuple[int, int]]]) -> StatefulDataLoader:
        return StatefulDataLoader(
            documents,
            batch_sampler=batches,
            collate_fn=self._collate,
            num_workers=self.num_workers,
            generator=generator_for(self.seed),  # or it would draw from torch's global one
        )

    def documents(self, split: str) -> Documents:
        """The documents of a split, as segments; (epoch, index) addresses one, the epoch drawing its EOS padding."""
        key = (self.shards or self._shards(), split)
        if key not in self._documents:
            rows, selection = self._selected(*key)
            usual = {name: next(iter(size.values())) for name, size in self.seen.canvas.items()}
            shuffled = self.shuffle_segments and split == "train"
            documents = Documents(rows, selection, self.sequencer, usual, self.max_eos_padding, self.seed, shuffled)
            self._documents[key] = documents
        return self._documents[key]

    @property
    def seen(self) -> SeenDocuments:
        """What the training documents are like, which is stored with the model; of another split if there are none."""
        place = self.shards or self._shards()
        if place not in self._seen:
            for split in SPLITS:
                try:
                    rows, selection = self._selected(place, split)
                    break
                except tokenized.EmptySplitError:
                    continue
            else:
                raise ValueError(f"{self.folder / 'metadata.jsonl'} has no documents that can be read")
            varies = {name: tokenizer.variable_length for name, tokenizer in self.tokenizers.items()}
            orders, sizes = count(rows, selection)
            self._seen[place] = SeenDocuments.of(orders, sizes, self.shuffle_segments, self.max_eos_padding, varies)
        return self._seen[place]

    def _selected(self, place: Path, split: str) -> tuple[Dataset, Selection]:
        key = (place, split)
        if key not in self._selections:
            rows = tokenized.open_split(place, split)
            metadata = self.folder / "metadata.jsonl"
            chosen = select(rows, split, self.tokenizers, self.max_seq_length, self.long_documents, metadata)
            self._selections[key] = rows, chosen
        return self._selections[key]

    def _collate(self, documents: list[list[Segment]]) -> TokenBatch:
        batch = self.sequencer.batch(documents, self.row_length)
        stands_in_D = torch.tensor([isinstance(document, StandIn) for document in documents])
        batch.divisor_S[stands_in_D[batch.document_S]] = 0
        return batch


class StandIn(list[Segment]):
    """A document that is evaluated only because other ranks have one more."""


class Documents(torch.utils.data.Dataset):
    """Tokenized documents as lists of segments.

    Args:
        rows, selection: of a split.
        sequencer: makes the segments.
        usual: name -> units of the usual canvas; only those of items of varying length are used.
        max_eos_padding, seed: as in `DocumentDataModule`.
        shuffled: whether the segments of a document are put in random order.
    """

    def __init__(
        self,
        rows: Dataset,
        selection: Selection,
        sequencer: Sequencer,
        usual: Mapping[str, int],
        max_eos_padding: Mapping[str, int],
        seed: int,
        shuffled: bool,
    ):
        self.rows, self.selection, self.sequencer = rows, selection, sequencer
        self.usual, self.max_eos_padding, self.seed, self.shuffled = usual, max_eos_padding, seed, shuffled

    def __len__(self) -> int:
        return len(self.selection.rows)

    def __getitem__(self, key: tuple[int, int]) -> list[Segment]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[list[Segment]]:
        rows = self._rows([index for _, index in keys])
        return [
            (StandIn if key[0] == STAND_IN_EPOCH else list)(self._document(generator_for(self.seed, *key), *row))
            for key, row in zip(keys, rows, strict=True)
        ]

    def codes(self, index: int) -> list[tuple[str, Codes]]:
        """The codes of a document, with the names of their tokenizers."""
        ((names, ids, sizes, _),) = self._rows([index])
        return [self._codes(*part) for part in zip(names, ids, sizes, strict=True)]

    def _rows(self, indices: Sequence[int]) -> list[tuple[list[str], list[list[int]], list[str], list[bool]]]:
        """names, ids, sizes and whether the item ends there, of the segments of each document."""
        columns = self.rows[[self.selection.rows[index] for index in indices]]
        rows = []
        for index, names, ids, sizes in zip(indices, columns["names"], columns["ids"], columns["sizes"], strict=True):
            ends = [True] * len(names)
            if parts := self.selection.parts.get(index):
                ids = [codes[part.start : part.stop] for codes, part in zip(ids, parts, strict=True)]
                sizes, ends = [part.size for part in parts], [part.ends for part in parts]
            rows.append((names, ids, sizes, ends))
        return rows

    def _codes(self, name: str, ids: list[int], size: str) -> tuple[str, Codes]:
        canvas = self.sequencer.canvas(name, json.loads(size))
        return name, Codes(torch.tensor(ids, dtype=torch.int64), canvas.levels_N, canvas.coords_N3, canvas.size)

    def _document(
        self, generator: torch.Generator, names: list[str], ids: list[list[int]], sizes: list[str], ends: list[bool]
    ) -> list[Segment]:
        segments = []
        for name, of_segment, size, end in zip(names, ids, sizes, ends, strict=True):
            _, codes = self._codes(name, of_segment, size)
            max_eos_padding = 0
            if end and self.sequencer.vocabulary.tokenizers[name].variable_length:
                length = next(iter(codes.size.values()))
                most = most_units(length, self.usual.get(name, 0), self.max_eos_padding.get(name))
                max_eos_padding = int(torch.randint(1, most - length + 1, (), generator=generator))
            segments.append(self.sequencer.given(name, codes, max_eos_padding))
        if self.shuffled:
            segments = [segments[place] for place in torch.randperm(len(segments), generator=generator).tolist()]
        return segments


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Base of (epoch, index) of the documents of each batch, in another order every epoch. Its state is two numbers.

    Raises:
        ValueError: fewer documents than ranks.
    """

    def __init__(self, documents: int, seed: int, rank: int = 0, ranks: int = 1):
        if documents < ranks:
            raise ValueError(
                f"the training split has fewer items ({documents}) than there are processes that train ({ranks}). Set "
                f"trainer.devices and num_nodes so that there are at most {documents}."
            )
        self.documents, self.seed, self.rank, self.ranks = documents, seed, rank, ranks
        self.epoch, self.batch = -1, 0
        self._resumed = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def indices(self, generator: torch.Generator) -> list[list[int]]:
        """The documents of this rank's batches of an epoch; the generator is the same on all ranks."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if not (self._resumed and self.batch < len(self)):
            self.epoch, self.batch = self.epoch + 1, 0
        self._resumed = False
        batches = self.indices(generator_for(self.seed, self.epoch))
        while self.batch < len(self):
            self.batch += 1
            yield [(self.epoch, index) for index in batches[self.batch - 1]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]
        self._resumed = True


class ShuffledBatches(EpochBatches):
    """(epoch, index) of the documents of each batch: shuffled again every epoch, split over ranks, resumable.

    What does not fill a batch on every rank is left to other epochs.

    Raises:
        ValueError: fewer documents than ranks.
    """

    def __init__(self, documents: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1):
        super().__init__(documents, seed, rank, ranks)
        self.batch_size = min(batch_size, max(1, documents // ranks))

    def __len__(self) -> int:
        return self.documents // (self.batch_size * self.ranks)

    def indices(self, generator: torch.Generator) -> list[list[int]]:
        mine = torch.randperm(self.documents, generator=generator).tolist()[self.rank :: self.ranks]
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        return [mine[start : start + self.batch_size] for start in starts]
