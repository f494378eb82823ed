"""Which items each batch of an epoch holds: in another order every epoch, split over processes, resumable."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

from multidiff.seeding import generator_for


class EpochBatches(Sampler[list[Any]]):
    """Base of the keys of the items of each batch: (epoch, index), in another order every epoch. Its state is two
    numbers.

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

    def key(self, batch: int, place: int, index: int) -> tuple[int, ...]:
        """What the data set is asked for: item `index`, at `place` of this rank's `batch` of the epoch."""
        return self.epoch, index

    def __iter__(self) -> Iterator[list[Any]]:
        if not (self._resumed and self.batch < len(self)):
            self.epoch, self.batch = self.epoch + 1, 0
        self._resumed = False
        batches = self.indices(generator_for(self.seed, self.epoch))
        while self.batch < len(self):
            self.batch += 1
            number = self.batch - 1
            yield [self.key(number, place, index) for place, index in enumerate(batches[number])]

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


class DocumentKey(NamedTuple):
    """A document as a loader asks for it.

    Attributes:
        epoch: completed passes over the data; -1 in evaluation.
        position: place in the order of the epoch, over all processes.
        index: of the document in its split.
        counts: False for one that is evaluated only because other processes have one more.
    """

    epoch: int
    position: int
    index: int
    counts: bool = True


class DocumentBatches(ShuffledBatches):
    """`ShuffledBatches` of documents, whose keys say where in the epoch each document stands."""

    def key(self, batch: int, place: int, index: int) -> DocumentKey:
        return DocumentKey(self.epoch, (batch * self.batch_size + place) * self.ranks + self.rank, index)
