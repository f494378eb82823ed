"""A loader of documents that knows where training is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from multidiff.data.batches import DocumentBatches
from multidiff.data.documents import Documents


class DocumentLoader(DataLoader):
    """Batches of documents for training.

    A loader reads ahead, in its workers and for Lightning. So what a checkpoint keeps is not how far the loader has
    come, but the place behind the last batch that was trained on. It says nothing of workers and processes.

    Args:
        documents: what is loaded.
        batches: which documents each batch holds.
        trained: how many batches that were delivered are not trained on yet, and whether the epoch has ended.
        options: of `DataLoader`.
    """

    def __init__(
        self, documents: Documents, batches: DocumentBatches, trained: Callable[[], tuple[int, bool]], **options: Any
    ):
        super().__init__(documents, batch_sampler=batches, **options)
        self._batches, self._trained = batches, trained
        self._reached = [batches.state_dict()]  # by the last batches that were delivered
        self._resumed = False

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        last = self._reached[-1]
        self._reached = [last if self._resumed else {**last, "ended": True}]  # an epoch may be left before its end
        self._batches.load_state_dict(self._reached[0])
        self._resumed = False
        for batch in super().__iter__():
            self._reached = [*self._reached[-2:], self._batches.reached.popleft()]
            yield batch
        self._reached = [{**self._reached[-1], "ended": True}]

    def state_dict(self) -> dict[str, Any]:
        """Where training is."""
        waiting, ended = self._trained()
        state = self._reached[max(0, len(self._reached) - 1 - waiting)]
        return {**state, "ended": state["ended"] or ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the checkpoint was trained on other documents.
        """
        self._batches.check(state_dict)
        self._reached, self._resumed = [state_dict], True
