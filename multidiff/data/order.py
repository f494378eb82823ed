"""The order of documents: shards shuffled, and documents within windows of shards; several sources mixed.

The order follows from the seed and the epoch alone, so it is the same for any number of processes and workers. It is
computed window by window: an epoch of any size takes the memory of one window, and reading stays close to some shards.

Shape suffixes: D documents of a window, K shards.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

from multidiff.seeding import generator_for, key_for, uniforms

WINDOW = 2**17  # documents that are shuffled with each other; a split of up to as many is shuffled as a whole


class ShuffledOrder:
    """The documents of a split in the order of each epoch.

    Args:
        starts: the first document of each shard, and behind the last one.
        key: what the order follows from, beside the epoch.
        window: documents that are shuffled with each other.
    """

    def __init__(self, starts: np.ndarray, *key: int | str, window: int = WINDOW):
        self.starts, self.key, self.window = starts, key, window
        self._made: tuple[tuple[int, int], np.ndarray] = ((-1, -1), starts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def indices(self, epoch: int, start: int, stop: int) -> list[int]:
        """The documents at places `start` to `stop` of an epoch."""
        found: list[int] = []
        while start < min(stop, len(self)):
            number, inside = divmod(start, self.window)
            some = self._window(epoch, number)[inside : inside + stop - start].tolist()
            found += some
            start += len(some)
        return found

    def _window(self, epoch: int, number: int) -> np.ndarray:
        if self._made[0] != (epoch, number):
            order_K = torch.randperm(len(self.starts) - 1, generator=generator_for(*self.key, "shards", epoch)).numpy()
            sizes_K = np.diff(self.starts)[order_K]
            ends_K = np.cumsum(sizes_K)
            first, last = number * self.window, min((number + 1) * self.window, len(self))
            parts = []
            for place in range(int(np.searchsorted(ends_K, first, side="right")), len(order_K)):
                begin = int(ends_K[place] - sizes_K[place])
                if begin >= last:
                    break
                shard = int(self.starts[order_K[place]])
                parts.append(np.arange(shard + max(0, first - begin), shard + min(sizes_K[place], last - begin)))
            documents_D = np.concatenate(parts)
            shuffled_D = torch.randperm(len(documents_D), generator=generator_for(*self.key, "window", epoch, number))
            self._made = (epoch, number), documents_D[shuffled_D.numpy()]
        return self._made[1]


@dataclass(frozen=True)
class Weight:
    """How often a source is drawn from, in proportion: a number, or one that changes over training.

    Attributes:
        points: (documents seen, weight), in the order of documents; between them the weight changes evenly.
    """

    points: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, value: float | Sequence[Sequence[float]], name: str) -> Weight:
        """A weight from YAML: 2, or [[0, 1], [1_000_000, 3]].

        Raises:
            ValueError: it is none.
        """
        points = [[0, value]] if isinstance(value, int | float) else value
        good = isinstance(points, Sequence) and len(points) > 0 and all(
            isinstance(point, Sequence)
            and len(point) == 2
            and all(isinstance(number, int | float) and 0 <= number < math.inf for number in point)
            for point in points
        )  # fmt: skip
        if not good or any(one[0] >= other[0] for one, other in pairwise(points)):
            raise ValueError(
                f"The weight of source {name!r} must be a number of at least 0, or pairs of documents seen and such a "
                f"number, in order, not {value!r}."
            )
        return cls(tuple((int(seen), float(number)) for seen, number in points))

    def at(self, seen: int) -> float:
        """The weight after so many documents."""
        places = [place for place, _ in self.points]
        number = bisect_right(places, seen)
        if number == 0 or number == len(places):
            return self.points[min(number, len(places) - 1)][1]
        (start, before), (stop, after) = self.points[number - 1 : number + 1]
        return before + (after - before) * (seen - start) / (stop - start)


class Drawn(NamedTuple):
    """A document as the order has it.

    Attributes:
        source: its number.
        epoch: completed passes over that source.
        index: of the document in the split of that source.
    """

    source: int
    epoch: int
    index: int


class MixedOrder:
    """Documents of several sources, each in its own order, epoch after epoch, drawn in proportion to their weights.

    Args:
        orders: of the sources.
        weights: of the sources; None where there is one.
        key: what the draw follows from.
    """

    def __init__(self, orders: Sequence[ShuffledOrder], weights: Sequence[Weight] | None, *key: int | str):
        self.orders, self.weights, self.key = orders, weights, key

    def __len__(self) -> int:
        return sum(map(len, self.orders))

    def start(self) -> list[int]:
        """How many documents of each source are taken at first."""
        return [0] * len(self.orders)

    def take(self, taken: list[int], number: int) -> list[Drawn]:
        """The next documents, which `taken` then counts. The weights must not all be 0 there."""
        if self.weights is None:
            ((order,), (begin,)) = self.orders, taken
            found: list[Drawn] = []
            while len(found) < number:
                epoch, place = divmod(begin + len(found), len(order))
                some = order.indices(epoch, place, place + number - len(found))
                found += [Drawn(0, epoch, index) for index in some]
            taken[0] += number
            return found
        found, seen = [], sum(taken)
        uniform = uniforms([key_for(*self.key, "mixture", seen + place) for place in range(number)], [1] * number)
        for place, value in enumerate(uniform.tolist()):
            shares = list(accumulate(weight.at(seen + place) for weight in self.weights))
            source = min(bisect_right(shares, value * shares[-1]), len(shares) - 1)
            epoch, inside = divmod(taken[source], len(self.orders[source]))
            (index,) = self.orders[source].indices(epoch, inside, inside + 1)
            found.append(Drawn(source, epoch, index))
            taken[source] += 1
        return found
