"""Several sources as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from multidiff.data.order import Weight
from multidiff.data.sources.folder import Folder
from multidiff.data.sources.source import Source


class Mixture:
    """Several sources, from which training draws documents in proportion to their weights.

    Args:
        sources: name -> a data folder or a source.
        weights: name -> how often it is drawn from, in proportion; 1 where not named. A list of pairs [documents seen,
            weight] changes evenly from one to the next: [[0, 1.0], [1000000, 0.0]].

    Raises:
        ValueError: no sources, a weight of none of them, or weights that are all 0 at some time.
    """

    def __init__(self, sources: dict[str, str | Source], weights: dict[str, Any] | None = None):
        if not sources:
            raise ValueError("A mixture needs at least one source.")
        self.sources = {name: as_source(source) for name, source in sources.items()}
        given: Mapping[str, float | Sequence[Sequence[float]]] = weights or {}
        for name in given:
            if name not in self.sources:
                raise ValueError(f"weights: no source is called {name!r}. There are {', '.join(self.sources)}.")
        self.weights = [Weight.of(given.get(name, 1.0), name) for name in self.sources]
        for seen in sorted({place for weight in self.weights for place, _ in weight.points}):
            if not sum(weight.at(seen) for weight in self.weights) > 0:
                raise ValueError(
                    f"The weights of all sources are 0 after {seen:,} documents. Give one of them more than 0."
                )


def as_source(source: str | Source) -> Source:
    """A source; a text is the path of a data folder."""
    return source if isinstance(source, Source) else Folder(source)
