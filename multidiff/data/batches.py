"""Which items each batch of an epoch holds: in another order every epoch, split over processes, resumable."""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

from multidiff.data.order import MixedOrder
from multidiff.seeding import generator_for

EVALUATION = -1  # the epoch of what is evaluated
_AHEAD = 256  # documents whose lengths are looked up at a time


def check_ranks(documents: int, ranks: int) -> None:
    """Raise a `ValueError` if there are fewer documents, or other items, than processes."""
    if documents < ranks:
        raise ValueError(
            f"the training split has fewer items ({documents}) than there are processes that train ({ranks}). Set "
            f"trainer.devices and num_nodes so that there are at most {documents}."
        )


class EpochBatches(Sampler[list[Any]]):
    """Base of the keys of the items of each batch: (epoch, index), in another order every epoch. Its state is two
    numbers.

    Raises:
        ValueError: fewer documents than ranks.
    """

    def __init__(self, documents: int, seed: int, rank: int = 0, ranks: int = 1):
        check_ranks(documents, ranks)
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
        epoch: completed passes over its source; -1 in evaluation.
        position: place in the order of the epoch, over all processes.
        index: of the document in its split, behind those of the sources before its own.
        counts: False for one that is evaluated only because other processes have one more.
    """

    epoch: int
    position: int
    index: int
    counts: bool = True


@dataclass(frozen=True)
class Limits:
    """How large a batch of a process may be.

    Attributes:
        batch_size: documents; None is as many as fit.
        max_tokens: tokens; None is no limit.
        tokens: how many tokens each of some documents has.
    """

    batch_size: int | None
    max_tokens: int | None
    tokens: Callable[[Sequence[DocumentKey]], list[int]]

    def sizes(self, keys: Sequence[DocumentKey]) -> list[int]:
        """Tokens of documents, as far as they matter."""
        return self.tokens(keys) if self.max_tokens is not None else [0] * len(keys)

    def fill(self, ahead: Sequence[tuple[DocumentKey, int]], start: int) -> int:
        """Where a batch ends that begins at `start`; the end of `ahead` if everything fits.

        Raises:
            ValueError: a single document has more tokens than a batch may have.
        """
        room = math.inf if self.max_tokens is None else self.max_tokens
        most = len(ahead) if self.batch_size is None else min(len(ahead), start + self.batch_size)
        for place in range(start, most):
            room -= ahead[place][1]
            if room < 0:
                if place == start:
                    raise ValueError(
                        f"A document has {ahead[place][1]:,} tokens with its EOS padding, more than the max_tokens "
                        f"{self.max_tokens:,} of a batch. Raise max_tokens, or lower max_seq_length."
                    )
                return place
        return most

    def is_full(self, number: int, at_end: bool) -> bool:
        """Whether nothing more fits beside so many documents, where the next one is too large or there is none."""
        return number == self.batch_size or not at_end


class DocumentBatches:
    """The documents of each batch of a process, epoch after epoch.

    Step by step, the processes together take the next documents of the order, one process after the other. So training
    goes on at the same document with another number of processes or other limits, and shows none twice. What does not
    fill the last step of an epoch on every process is left to other epochs.

    Attributes:
        reached: the states behind the batches that were yielded, for a loader to take.

    Args:
        order: of the documents.
        offsets: what is added to the index of a document of each source.
        limits: of a batch.
        rank, ranks: this process, and how many there are.

    Raises:
        ValueError: fewer documents than processes.
    """

    def __init__(self, order: MixedOrder, offsets: Sequence[int], limits: Limits, rank: int = 0, ranks: int = 1):
        check_ranks(len(order), ranks)
        self.order, self.offsets, self.limits, self.rank, self.ranks = order, offsets, limits, rank, ranks
        if limits.max_tokens is None:
            size = limits.batch_size or len(order)
            self.limits = replace(limits, batch_size=min(size, len(order) // ranks))
        self.epoch, self.seen, self.taken = -1, 0, order.start()
        self._ended = True
        self.reached: deque[dict[str, Any]] = deque()

    def __len__(self) -> int:
        """Batches of an epoch.

        Raises:
            TypeError: it depends on the documents.
        """
        if self.limits.max_tokens is not None or self.limits.batch_size is None:
            raise TypeError("The number of batches follows from the lengths of the documents.")
        return len(self.order) // (self.limits.batch_size * self.ranks)

    def __iter__(self) -> Iterator[list[DocumentKey]]:
        self.reached.clear()
        ahead, reach = [], list(self.taken)
        if self._ended or not self._step(ahead, reach):
            if len(self.order.orders) == 1:
                self.taken = [(self.epoch + 1) * len(self.order)]
            self.epoch, self.seen = self.epoch + 1, 0
            ahead, reach = [], list(self.taken)
        self._ended = False
        while step := self._step(ahead, reach):
            for key, _ in ahead[: step[-1][1]]:
                self.taken[self._source(key)] += 1
            self.seen += step[-1][1]
            start, stop = step[self.rank]
            mine = [key for key, _ in ahead[start:stop]]
            del ahead[: step[-1][1]]
            self.reached.append(self.state_dict())
            yield mine
        self._ended = True

    def _step(self, ahead: list[tuple[DocumentKey, int]], reach: list[int]) -> list[tuple[int, int]] | None:
        """Where in `ahead` the batches of the processes lie; None if the epoch has no more steps."""
        parts: list[tuple[int, int]] = []
        for _ in range(self.ranks):
            start = parts[-1][1] if parts else 0
            while True:
                stop = self.limits.fill(ahead, start)
                if self.limits.is_full(stop - start, at_end=stop == len(ahead)):
                    break
                if not self._look_ahead(ahead, reach):
                    return self._small_epoch(ahead) if not self.seen else None
            parts.append((start, stop))
        return parts

    def _look_ahead(self, ahead: list[tuple[DocumentKey, int]], reach: list[int]) -> bool:
        position = self.seen + len(ahead)
        number = min(_AHEAD, len(self.order) - position)
        drawn = self.order.take(reach, number)
        keys = [
            DocumentKey(one.epoch, position + place, self.offsets[one.source] + one.index)
            for place, one in enumerate(drawn)
        ]
        ahead += zip(keys, self.limits.sizes(keys), strict=True)
        return number > 0

    def _small_epoch(self, ahead: list[tuple[DocumentKey, int]]) -> list[tuple[int, int]]:
        """The one step of an epoch that has too few documents for a full one: as many for each process."""
        each = len(ahead) // self.ranks
        parts: list[tuple[int, int]] = []
        for rank in range(self.ranks):
            start = rank * each
            parts.append((start, min(start + each, self.limits.fill(ahead, start))))
        most = min(stop - start for start, stop in parts)
        return [(start, start + most) for start, _ in parts]

    def _source(self, key: DocumentKey) -> int:
        return bisect_right(self.offsets, key.index) - 1

    def state_dict(self) -> dict[str, Any]:
        """Where the batches are: behind the last one that was yielded."""
        sizes = [len(order) for order in self.order.orders]
        return {
            "epoch": self.epoch,
            "seen": self.seen,
            "taken": list(self.taken),
            "ended": self._ended,
            "sizes": sizes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check(state)
        self.epoch, self.seen, self.taken = state["epoch"], state["seen"], list(state["taken"])
        self._ended = state["ended"]

    def check(self, state: dict[str, Any]) -> None:
        """Refuse the state of a training on other documents.

        Raises:
            ValueError: another number of sources, or of documents in them.
        """
        sizes = [len(order) for order in self.order.orders]
        if state["sizes"] != sizes:
            raise ValueError(
                f"The checkpoint (--ckpt_path) was trained on {_said(state['sizes'])}, but the data now have "
                f"{_said(sizes)}, so that it is not known which are done. Continue with the data as they were."
            )


def _said(sizes: Sequence[int]) -> str:
    return f"{' + '.join(f'{size:,}' for size in sizes)} documents"


def evaluation_batches(documents: int, limits: Limits, rank: int, ranks: int) -> list[list[DocumentKey]]:
    """The documents of each batch of a process, each document once over all processes.

    All have as many batches, so that none waits for another in vain: what stands in counts for nothing.
    """
    keys = [DocumentKey(EVALUATION, number, number) for number in range(documents)]
    ahead = list(zip(keys, limits.sizes(keys), strict=True))
    if limits.max_tokens is None:  # in turn, so that a process gets its share of every kind of documents
        places = range(rank, -(-documents // ranks) * ranks, ranks)
        mine = [DocumentKey(EVALUATION, place, place % documents, place < documents) for place in places]
        size = limits.batch_size or len(mine)
        return [mine[start : start + size] for start in range(0, len(mine), size)]
    batches, start = [], 0
    while start < documents:
        for number in range(ranks):
            stop = limits.fill(ahead, start)
            if number == rank:
                stand_in = keys[0]._replace(counts=False)
                batches.append(keys[start:stop] or [stand_in])
            start = stop
    return batches
