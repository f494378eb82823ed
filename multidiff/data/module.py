"""`DocumentDataModule`: a data folder as batches of documents for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torchdata.stateful_dataloader import StatefulDataLoader

from multidiff import plugins
from multidiff.data import tokenized
from multidiff.data.batches import DocumentBatches, DocumentKey
from multidiff.data.counts import Counts, count
from multidiff.data.documents import Documents, check_eos_padding
from multidiff.data.folder import SPLITS
from multidiff.data.length import LongDocuments, Selection, select
from multidiff.seeding import generator_for
from multidiff.sequence import Example, SeenDocuments, Sequencer, SharedVocabulary

EVALUATION = -1  # the epoch of what is evaluated
Collate = Callable[[Sequence[Example]], Any]


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
    """Documents of a data folder, tokenized once, in batches.

    Args:
        folder: holds `metadata.jsonl` (`multidiff.data.folder`).
        tokenizers: name -> {plugin: …, arguments}, as the model has them; in YAML write
            `${model.init_args.tokenizers}`.
        batch_size: documents of a batch, on each device.
        max_eos_padding: largest number of EOS, in units (tokens, frames), after a text, a sound or another item of
            varying length, by tokenizer name; drawn uniformly from 1. What is not named gets canvases as generation
            has them, so that their size says how much room there is and not how long the item is: half of them the
            usual one, which holds 95 % of the training items and is the size of a blank in generation, the others of
            any size between the item's and the usual one, or up to a quarter more than the item if that is more.
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
            codes. Cuts lie between tokens or frames, and no EOS follows them, for the item goes on. What cannot be
            cropped or split raises.
        num_workers: processes that read files and build batches.
        seed: of the order and of EOS padding.

    Attributes:
        collate, collate_evaluation: functions from a list of `Example` to a batch. The training module sets them.
    """

    def __init__(
        self,
        folder: str,
        tokenizers: dict[str, dict[str, Any]],
        batch_size: int = 64,
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
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        if max_seq_length is not None and max_seq_length < 1:
            raise ValueError(f"max_seq_length {max_seq_length} must be at least 1, or null for no limit")
        if long_documents not in get_args(LongDocuments):
            raise ValueError(f"long_documents {long_documents!r} is none of {', '.join(get_args(LongDocuments))}")
        self.folder = Path(folder)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.max_eos_padding, self.shuffle_segments = max_eos_padding or {}, shuffle_segments
        self.cache = Path(cache) if cache else None
        self.on_error: tokenized.OnError = on_error
        self.max_seq_length = max_seq_length
        self.long_documents: LongDocuments = long_documents
        self.tokenizers = plugins.build(tokenizers)
        check_eos_padding(self.max_eos_padding, self.tokenizers)
        self.vocabulary = SharedVocabulary.of(self.tokenizers)
        self.sequencer = Sequencer(self.tokenizers, self.vocabulary)
        self.collate: Collate = list
        self.collate_evaluation: Collate = list
        self.shards: Path | None = None
        self._prepared: Path | None = None
        self._selections: dict[tuple[Path, str], tuple[Dataset, Selection]] = {}
        self._documents: dict[tuple[Path, str], Documents] = {}
        self._counts: dict[Path, Counts] = {}

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
        order = DocumentBatches(len(documents), self.batch_size, self.seed, rank, ranks)
        return self._loader(documents, order, self.collate)

    def val_dataloader(self) -> StatefulDataLoader:
        return self._evaluation("validation")

    def test_dataloader(self) -> StatefulDataLoader:
        return self._evaluation("test")

    def _evaluation(self, split: str) -> StatefulDataLoader:
        rank, ranks = self.rank()
        documents = self.documents(split)
        # As many for every rank, so that none waits for another in vain; what stands in counts for nothing.
        places = range(rank, -(-len(documents) // ranks) * ranks, ranks)
        keys = [
            DocumentKey(EVALUATION, place, place % len(documents), counts=place < len(documents)) for place in places
        ]
        batches = [keys[start : start + self.batch_size] for start in range(0, len(keys), self.batch_size)]
        return self._loader(documents, batches, self.collate_evaluation)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move what can be moved. Documents whose likelihood is measured stay where their masks are drawn."""
        return batch.to(device) if hasattr(batch, "to") else batch

    def _loader(
        self, documents: Documents, batches: Iterable[list[DocumentKey]], collate: Collate
    ) -> StatefulDataLoader:
        return StatefulDataLoader(
            documents,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=generator_for(self.seed),  # or it would draw from torch's global one
        )

    def documents(self, split: str) -> Documents:
        """The documents of a split."""
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
        varies = {name: tokenizer.variable_length for name, tokenizer in self.tokenizers.items()}
        counts = self._counted()
        return SeenDocuments.of(counts.orders, counts.sizes, self.shuffle_segments, self.max_eos_padding, varies)

    @property
    def labels(self) -> list[str]:
        """The labels of the segments of these documents, the most frequent first."""
        return [label for label, _ in self._counted().labels.most_common()]

    def _counted(self) -> Counts:
        place = self.shards or self._shards()
        if place not in self._counts:
            for split in SPLITS:
                try:
                    self._counts[place] = count(*self._selected(place, split))
                    break
                except tokenized.EmptySplitError:
                    continue
            else:
                raise ValueError(f"{self.folder / 'metadata.jsonl'} has no documents that can be read")
        return self._counts[place]

    def _selected(self, place: Path, split: str) -> tuple[Dataset, Selection]:
        key = (place, split)
        if key not in self._selections:
            rows = tokenized.open_split(place, split)
            metadata = self.folder / "metadata.jsonl"
            chosen = select(rows, split, self.tokenizers, self.max_seq_length, self.long_documents, metadata)
            self._selections[key] = rows, chosen
        return self._selections[key]
