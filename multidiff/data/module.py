"""`DocumentDataModule`: a source of documents as batches of documents for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from multidiff import plugins
from multidiff.data.batches import DocumentBatches, Limits, evaluation_batches
from multidiff.data.documents import Documents, check_eos_padding
from multidiff.data.length import LongDocuments, Selection, select
from multidiff.data.loader import DocumentLoader
from multidiff.data.order import WINDOW, MixedOrder, ShuffledOrder, Weight
from multidiff.data.shards import Counts, ShardFolder
from multidiff.data.sources.mixture import Mixture, as_source
from multidiff.data.sources.source import SPLITS, Source
from multidiff.data.splits import Split
from multidiff.data.tokenizing import EmptySplitError, OnError, check_split, tokenize
from multidiff.seeding import generator_for
from multidiff.sequence import Example, SeenDocuments, Sequencer, SharedVocabulary

Collate = Callable[[Sequence[Example]], Any]


class RankedData(LightningDataModule):
    """Base of data modules that give each process documents of its own."""

    def rank(self) -> tuple[int, int]:
        """This process among those that train together, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class BatchedData(RankedData):
    """Base of data modules that `EpochBatches` serve, which go on only as they were.

    Attributes:
        batch_size: items of a batch, on each device.
    """

    batch_size: int

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


class DocumentDataModule(RankedData):
    """Documents of a source, tokenized once, in batches.

    Args:
        source: a data folder, which holds `metadata.jsonl` (`multidiff.data.sources.folder`); or another source, such
            as {class_path: multidiff.data.Table, init_args: …}; or a `multidiff.data.Mixture` of several.
        tokenizers: name -> {plugin: …, arguments}, as the model has them; in YAML write
            `${model.init_args.tokenizers}`.
        batch_size: most documents of a batch, on each device. Null is 64, or as many as `max_tokens` lets in.
        max_tokens: most tokens of a batch, on each device, with EOS padding, and with second copies of documents where
            the model is trained with these. Batches are then filled up with documents in their order.
        max_eos_padding: largest number of EOS, in units (tokens, frames), after a text, a sound or another item of
            varying length, by tokenizer name; drawn uniformly from 1. What is not named gets canvases as generation
            has them, so that their size says how much room there is and not how long the item is: half of them the
            usual one, which holds 95 % of the training items and is the size of a blank in generation, the others of
            any size between the item's and the usual one, or up to a quarter more than the item if that is more.
        shuffle_window: documents that are shuffled with each other, from neighbouring shards after these are shuffled.
            Data with fewer documents are shuffled as a whole.
        shuffle_segments: order the segments of a training document at random, each time again, so that the model works
            in any order. Set it to false where the order carries meaning, as in a dialogue or a sequence of pictures;
            generation then has to ask in an order that was trained.
        cache: where codes are kept; null leaves it to the source: `.tokenized` in the data folder.
        on_error: "raise", or "skip" documents that cannot be read and say how many.
        max_seq_length: most tokens of a document: `<bos>`, two structure tokens a segment, and its codes, without
            the EOS that max_eos_padding adds. Attention is quadratic. Null means no limit.
        long_documents: what a longer document does. "raise" stops with its file and line. "skip" leaves it out and says
            how many there are. "crop" cuts its segments of varying length at their ends, the longest most, and forgets
            the rest. "split" makes several documents of one that is a single segment of varying length, and keeps all
            codes. Cuts lie between tokens or frames, and no EOS follows them, for the item goes on. What cannot be
            cropped or split raises.
        num_workers: processes that read files and build batches.
        timeout: seconds that one of these processes may take for a batch before it counts as hanging; 0 waits for ever.
            Without such processes nothing can be timed.
        check_files: look at size and time of every file of the source at each start, and tokenize again what has
            changed. A million files take some seconds; set it to false where files never change.
        seed: of the order and of EOS padding.

    Attributes:
        collate, collate_evaluation: functions from a list of `Example` to a batch. The training module sets them.
        copies: how often a training step computes each token of a document, for `max_tokens`. The training module sets
            it.
    """

    def __init__(
        self,
        source: str | Source | Mixture,
        tokenizers: dict[str, dict[str, Any]],
        batch_size: int | None = None,
        max_tokens: int | None = None,
        max_eos_padding: dict[str, int] | None = None,
        shuffle_window: int = WINDOW,
        shuffle_segments: bool = True,
        cache: str | None = None,
        on_error: OnError = "raise",
        max_seq_length: int | None = 8192,
        long_documents: LongDocuments = "raise",
        num_workers: int = 0,
        timeout: float = 0.0,
        check_files: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("shuffle_window", shuffle_window)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if max_seq_length is not None and max_seq_length < 1:
            raise ValueError(f"max_seq_length {max_seq_length} must be at least 1, or null for no limit")
        if long_documents not in get_args(LongDocuments):
            raise ValueError(f"long_documents {long_documents!r} is none of {', '.join(get_args(LongDocuments))}")
        self.sources = list(source.sources.values()) if isinstance(source, Mixture) else [as_source(source)]
        self.weights: list[Weight] | None = source.weights if isinstance(source, Mixture) else None
        self.batch_size = 64 if batch_size is None and max_tokens is None else batch_size
        self.max_tokens, self.num_workers, self.seed, self.shuffle_window = (
            max_tokens,
            num_workers,
            seed,
            shuffle_window,
        )
        self.max_eos_padding, self.shuffle_segments = max_eos_padding or {}, shuffle_segments
        self.cache = Path(cache) if cache else None
        self.on_error: OnError = on_error
        self.timeout, self.check_files = timeout, check_files
        self.max_seq_length = max_seq_length
        self.long_documents: LongDocuments = long_documents
        self.tokenizers = plugins.build(tokenizers)
        check_eos_padding(self.max_eos_padding, self.tokenizers)
        self.vocabulary = SharedVocabulary.of(self.tokenizers)
        self.sequencer = Sequencer(self.tokenizers, self.vocabulary)
        self.collate: Collate = list
        self.collate_evaluation: Collate = list
        self.copies = 1
        self.shards: list[ShardFolder] | None = None
        self._selections: dict[tuple[Path, str], tuple[Split, Selection, Counts]] = {}
        self._documents: dict[tuple[Path | str, ...], Documents] = {}

    def prepare_data(self) -> None:
        self.shards = self._shards()

    def tokenize(self, trainer: Trainer) -> None:
        """Make the shards that are missing, on all devices of a trainer."""
        self.shards = self._shards(trainer=trainer)
        for shards in self.shards:
            documents = sum(counts.documents for counts in shards.counts.values())
            rank_zero_info(f"{documents} documents are tokenized in {shards.path}.")

    def setup(self, stage: str) -> None:
        if self.shards is None:  # another process of this node has just prepared them
            self.shards = self._shards(check_files=False)

    def _shards(self, check_files: bool = True, trainer: Trainer | None = None) -> list[ShardFolder]:
        return [
            tokenize(
                source,
                self.tokenizers,
                self.vocabulary,
                self.cache,
                self.on_error,
                self.num_workers,
                self.timeout,
                check_files and self.check_files,
                trainer,
            )
            for source in self.sources
        ]

    def train_dataloader(self) -> DocumentLoader:
        documents = self.documents("train")
        orders = [
            ShuffledOrder(selection.starts, self.seed, number, window=self.shuffle_window)
            for number, (_, selection) in enumerate(documents.parts)
        ]
        order = MixedOrder(orders, self.weights, self.seed)
        batches = DocumentBatches(order, documents.offsets[:-1], self._limits(documents), *self.rank())
        return DocumentLoader(documents, batches, self._trained, collate_fn=self.collate, **self._options())

    def val_dataloader(self) -> DataLoader:
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader:
        documents = self.documents(split)
        batches = evaluation_batches(len(documents), self._limits(documents), *self.rank())
        return DataLoader(documents, batch_sampler=batches, collate_fn=self.collate_evaluation, **self._options())  # pyright: ignore[reportArgumentType]

    def _trained(self) -> tuple[int, bool]:
        """How many batches Lightning holds ready for later steps, and whether the epoch has ended."""
        if self.trainer is None:
            return 0, False
        loop = self.trainer.fit_loop
        return len(getattr(loop._data_fetcher, "batches", ())), loop.epoch_loop.batch_progress.is_last_batch

    def _limits(self, documents: Documents) -> Limits:
        if self.max_tokens is not None:
            longest = self.copies * documents.longest
            if longest > self.max_tokens:
                raise ValueError(
                    f"A document takes {longest:,} tokens, more than the max_tokens {self.max_tokens:,} of a batch. "
                    "Raise max_tokens, or set max_seq_length and long_documents."
                )
        return Limits(
            self.batch_size, self.max_tokens, lambda keys: [self.copies * number for number in documents.tokens(keys)]
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move what can be moved. Documents whose likelihood is measured stay where their masks are drawn."""
        return batch.to(device) if hasattr(batch, "to") else batch

    def _options(self) -> dict[str, Any]:
        """Of any loader."""
        return {
            "num_workers": self.num_workers,
            "timeout": self.timeout if self.num_workers else 0.0,
            "pin_memory": torch.cuda.is_available(),
            "generator": generator_for(self.seed),  # or it would draw from torch's global one
        }

    def documents(self, split: str) -> Documents:
        """The documents of a split.

        Raises:
            EmptySplitError: there are none; of training documents, a source has none.
        """
        key = (*(shards.path for shards in self._known_shards()), split)
        if key not in self._documents:
            parts = [(found, selection) for found, selection, _ in self._selected(split)]
            usual = {name: next(iter(size.values())) for name, size in self.seen.canvas.items()}
            shuffled = self.shuffle_segments and split == "train"
            documents = Documents(parts, self.sequencer, usual, self.max_eos_padding, self.seed, shuffled)
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

    def _known_shards(self) -> list[ShardFolder]:
        self.shards = self.shards or self._shards()
        return self.shards

    def _counted(self) -> Counts:
        for split in SPLITS:
            try:
                selected = self._selected(split)
            except EmptySplitError:
                continue
            counts = Counts()
            for *_, some in selected:
                counts.merge(some)
            return counts
        raise ValueError(
            f"{', '.join(source.name for source in self.sources)}: there are no documents that can be read"
        )

    def _selected(self, split: str) -> list[tuple[Split, Selection, Counts]]:
        """The split of each source that has it."""
        found, missing = [], None
        for source, shards in zip(self.sources, self._known_shards(), strict=True):
            key = (shards.path, split)
            if key not in self._selections:
                try:
                    check_split(shards, split, source)
                except EmptySplitError as error:
                    missing = missing or error
                    continue
                some = Split(shards, split, source)
                self._selections[key] = some, *select(some, self.tokenizers, self.max_seq_length, self.long_documents)
            found.append(self._selections[key])
        if missing and (not found or split == "train"):
            raise missing
        return found
