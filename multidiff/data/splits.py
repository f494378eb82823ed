"""A split of a source, whose shards are opened when they are needed."""

from __future__ import annotations

from functools import lru_cache

from multidiff.data.shards import Counts, Shard, ShardFolder, ShardInfo
from multidiff.data.sources.source import Source

_MOST_OPEN = 256  # shards; each takes an open file


class Split:
    """The shards of a split.

    Args:
        folder: of all shards of the source.
        name: of the split.
        source: of the documents, for messages.

    Attributes:
        infos: what is known of each shard.
        counts: of the whole split.
    """

    def __init__(self, folder: ShardFolder, name: str, source: Source):
        self.folder, self.name, self._source = folder, name, source
        self.infos: list[ShardInfo] = folder.shards[name]
        self.counts: Counts = folder.counts[name]
        self.shard = lru_cache(_MOST_OPEN)(self._open)

    @property
    def source(self) -> str:
        """What messages call the source."""
        return self._source.name

    def where(self, shard: int, row: int) -> str:
        """The place of a document in the source, for messages."""
        return self._source.where(self.infos[shard].part, int(self.shard(shard).line_D[row]))

    def _open(self, number: int) -> Shard:
        return Shard(self.folder.path, self.infos[number])

    def __getstate__(self) -> dict[str, object]:
        """For loader workers: each opens shards for itself."""
        return {key: value for key, value in self.__dict__.items() if key != "shard"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.shard = lru_cache(_MOST_OPEN)(self._open)
